"""The words `RUN.yaml key=value ...` of a command line: which is the run's file, and which change a field of it."""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dsllm.config.paths import find_file
from dsllm.config.run import RunConfig
from dsllm.errors import ConfigError

_OVERRIDE = re.compile(r"\s*[A-Za-z_]\w*(\.\w+)*\s*=.*", re.DOTALL)
"""key.path=value, the path made of identifiers and of numbers in lists."""


_KNOWN = "|".join(
    rf"{section.name}\.{field.name}"
    for section in dataclasses.fields(RunConfig)
    if dataclasses.is_dataclass(section.type)
    for field in dataclasses.fields(section.type)
)
_FIELD = re.compile(rf"({_KNOWN})(\.\w+|\[\d+\])*")
"""The path of a field."""


@dataclass(frozen=True, kw_only=True)
class RunWords:
    """A run as a command line names it."""

    file: str | None = None
    """The run's YAML file; None: the embedded recipe."""
    overrides: tuple[str, ...] = ()
    """Fields to change in it, each as key.path=value."""


def add_run_words(parser: argparse.ArgumentParser, about: str = "") -> None:
    """Let a command take a run: its words are found under `words`, for `parse_run_words`."""
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RUN.yaml | key=value",
        help=about or "the run's YAML file (without one: the embedded recipe), and fields to change in it",
    )


def parse_run_words(words: Sequence[str], *files: str) -> RunWords:
    """Separate the run's file from the overrides. A word with "=" is the name of a file where such a file exists.

    Args:
        files: what an option of the command gave as the run's file.

    Raises:
        ConfigError: several files, or a word that is neither a file nor an override.
    """
    found, overrides = list(files), []
    for word in words:
        if find_file(word):
            found.append(word)
        elif _OVERRIDE.fullmatch(word):
            overrides.append(word)
        elif "=" in word or _FIELD.fullmatch(word):
            raise ConfigError(
                f"'{word}': there is no such file, and a field is changed by key.path=value, for example {_example(word)}"
            )
        else:
            found.append(word)
    if len(found) > 1:
        raise ConfigError(f"one config file at a time, but there are {len(found)}: {', '.join(found)}")
    return RunWords(file=found[0] if found else None, overrides=tuple(overrides))


def _example(word: str) -> str:
    """What was perhaps meant by a word that is not an override: entries of lists are written sources.0, not sources[0]."""
    path, equals, value = word.partition("=")
    dotted = re.sub(r"\[(\d+)\]", r".\1", path)
    if not _FIELD.fullmatch(dotted):
        return "train.total_tokens=2e6"
    return f"{dotted}={value if equals else 'VALUE'}"
