"""--json: the result of a command as one JSON document, in a file or alone on standard output."""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dsllm.cli.terminal import silence
from dsllm.errors import OutputError
from dsllm.files import partial, write_atomically

FORMAT_VERSION = 1
"""Of every document; raised when a key disappears or changes its meaning. New keys may come at any time."""
STANDARD_OUTPUT = "-"

Report = Callable[[Mapping[str, Any]], None]
"""Takes a command's result as plain values."""


def add_json_option(parser: argparse.ArgumentParser, content: str) -> None:
    """Give a command the option --json.

    Args:
        content: what the document contains, for --help
    """
    parser.add_argument(
        "--json",
        metavar="FILE",
        help=f"write {content} as JSON into FILE; -: to standard output, with all other output on standard error",
    )


@contextlib.contextmanager
def json_report(file: str | None, writes: bool = True) -> Iterator[Report]:
    """Yield a function that takes the command's result; it is written when the block ends without an error.

    With "-", everything that the block and its child processes print goes to standard error, also below Python.

    Args:
        file: the value of --json
        writes: False on ranks other than 0: they print to standard error too, and write nothing

    Raises:
        OutputError: the file cannot be written. Before the block where that can be known, else after it.
    """
    results: list[Mapping[str, Any]] = []
    if file and file != STANDARD_OUTPUT and writes:
        check_writable(Path(file))
    with _output_to_standard_error() if file == STANDARD_OUTPUT else contextlib.nullcontext():
        yield results.append
    if not (results and file and writes):
        return
    if file == STANDARD_OUTPUT:
        _print(json_text(results[-1]))
    else:
        write_json(Path(file), results[-1])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result into a file, atomically.

    Raises:
        OutputError: it cannot be written; a file of that name is unchanged.
    """
    write_text(path, json_text(content))


def write_text(path: Path, text: str) -> None:
    """Write a text into a file, atomically.

    Raises:
        OutputError: it cannot be written; a file of that name is unchanged.
    """
    try:
        if _is_device(path):
            path.write_text(text, encoding="utf-8")
        else:
            write_atomically(Path(os.path.realpath(path)), text)
    except OSError as error:
        raise _cannot_write(path, error) from error


def check_writable(path: Path) -> None:
    """Find out before long work that a result could not be written after it.

    Raises:
        OutputError: the path is a folder, or its folder is missing or takes no file.
    """
    if path.is_dir():
        raise OutputError(f"{path}: cannot be written: it is a folder")
    if _is_device(path):
        return
    aside = partial(Path(os.path.realpath(path)))
    try:
        aside.touch()
        aside.unlink()
    except OSError as error:
        raise _cannot_write(path, error) from error


def json_text(content: Mapping[str, Any]) -> str:
    """A result as a JSON document with the version of its format; numbers that are not finite are null."""
    return json.dumps(_finite({"format_version": FORMAT_VERSION, **content}), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _is_device(path: Path) -> bool:
    """/dev/stderr, /dev/null or a pipe: a file that is renamed over it would replace it."""
    return path.exists() and not path.is_file()


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path}: cannot be written: {error.strerror or error}")


@contextlib.contextmanager
def _output_to_standard_error() -> Iterator[None]:
    """Until the block ends, descriptor 1 is standard error, for libraries and child processes as well as for print."""
    out = sys.stdout
    out.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        with contextlib.suppress(OSError):
            out.flush()  # what a logger wrote to the old stream object
        os.dup2(kept, 1)
        os.close(kept)


def _print(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except OSError as error:
        silence()
        raise OutputError(f"standard output: cannot be written: {error.strerror or error}") from error
