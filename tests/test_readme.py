"""What the documents say is true: generated pages are fresh; commands, targets, files and links in them exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs import generate
from dsllm.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [
    *(*sorted(ROOT.glob("*.md")), ROOT / "llms.txt"),
    *(*sorted((ROOT / "docs").glob("*.md")), ROOT / "bench" / "RESULTS.md"),
]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PRODUCED = ("runs/", "out/", "data/")
"""Folders that commands write: a page may name what is not there yet."""
NAMED_FILE = re.compile(
    r"`((?:bench|docker|docs|ds_configs|dsllm|launch|tests)/[a-z0-9_/.-]+\.(?:py|yaml|json|md|sh|c|sbatch))`"
)
"""A file of the repository in the text. Capitals are a placeholder: `dsllm/cli/NAME.py`."""


def commands_in(page: Path) -> Iterator[list[str]]:
    """The command lines of a page's bash blocks, comments and prompts left out."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;", line):
                words = shlex.split(part, comments=True)
                if words:
                    yield words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    for words in commands_in(page):
        if words[0] == "make":
            assert set(words[1:2]) <= TARGETS, f"no such make target: {words}"
        if words[0] == "dsllm":
            assert words[1] in COMMANDS, f"no such command: {words}"
        for word in words[1:]:
            named = word.split("=")[-1]
            if re.fullmatch(r"[\w.-]+(/[\w.-]+)+\.(py|yaml|json|txt)", named) and not named.startswith(PRODUCED):
                assert (ROOT / named).is_file(), f"{named} is named in {page.name} but is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    named = set(NAMED_FILE.findall(page.read_text(encoding="utf-8")))
    assert not [name for name in sorted(named) if not (ROOT / name).is_file()]


@pytest.mark.parametrize("index", ["llms.txt", "docs/README.md"])
def test_an_index_names_every_page(index: str) -> None:
    text = (ROOT / index).read_text(encoding="utf-8")
    assert not [page.name for page in (ROOT / "docs").glob("[a-z]*.md") if f"{page.name})" not in text]


def test_generated_pages_are_fresh() -> None:
    assert not generate.stale(), "run `make docs` and commit what it writes"


def test_the_map_knows_every_package() -> None:
    packages = {p.parent.name for p in (ROOT / "dsllm").glob("*/__init__.py")}
    assert packages == set(generate.PACKAGES)
