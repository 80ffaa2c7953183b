"""The words `RUN.yaml key=value ...` of a command line: which is the run's file, and which change a field of it."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dsllm.config.paths import find_file
from dsllm.errors import ConfigError

_OVERRIDE = re.compile(r"\s*[A-Za-z_]\w*(\.\w+)*\s*=.*", re.DOTALL)
"""key.path=value, the path made of identifiers and of numbers in lists."""


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
        if "=" not in word or find_file(word):
            found.append(word)
        elif _OVERRIDE.fullmatch(word):
            overrides.append(word)
        else:
            raise ConfigError(
                f"'{word}': there is no such file, and a field is changed by key.path=value, for example train.total_tokens=2e6"
            )
    if len(found) > 1:
        raise ConfigError(f"one config file at a time, but there are {len(found)}: {', '.join(found)}")
    return RunWords(file=found[0] if found else None, overrides=tuple(overrides))
