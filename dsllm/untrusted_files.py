"""Reads files that may be damaged or come from someone else: within a folder, of a bounded size, never a device."""

import json
import math
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any

GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that stands for another one until `git lfs pull` puts that in its place."""
MOST_JSON_BYTES = 2**26
"""64 MiB: more than any tokenizer, config or index of a published model, and parsed within a second or two."""


class UntrustedFileError(ValueError):
    """A file or a name in it cannot be used; the message says why, without the file's path."""


def inside(folder: Path, name: object) -> Path:
    """The path of `name` in a folder, for a name that a file from elsewhere gives.

    Raises:
        UntrustedFileError: not a relative name, or it leaves the folder.
    """
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise UntrustedFileError(f"{name!r} is not a file name")
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts:
        raise UntrustedFileError(f"{name!r} leaves the folder: only files in it are read")
    return folder.joinpath(*parts)


def check_regular(path: Path) -> int:
    """The size of a regular file, in bytes. Links are followed; the file is not opened.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be looked at.
        UntrustedFileError: a folder, a device, a pipe or a socket.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, a pipe or a socket"
        raise UntrustedFileError(f"is {kind}, not a file")
    return status.st_size


def read_bounded(path: Path, most_bytes: int = MOST_JSON_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it is missing or cannot be read.
        UntrustedFileError: not a regular file, or larger than `most_bytes`.
    """
    size = check_regular(path)
    if size > most_bytes:
        raise UntrustedFileError(f"is {size:,} bytes long; at most {most_bytes:,} are read")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # non-blocking, in case a pipe has just taken its place
    with os.fdopen(descriptor, "rb") as file:
        return file.read(most_bytes)


def parse_json(content: bytes, unique_keys: bool = False) -> Any:
    """The value in a JSON file.

    Args:
        unique_keys: refuse an object that gives a key twice; False (default): the last one counts, as in all readers.

    Raises:
        UntrustedFileError: not UTF-8, not JSON, nested too deeply, or with a number that is not finite.
    """
    if not content.strip(b" \t\r\n\0"):
        raise UntrustedFileError("is empty")
    try:
        hook = _without_duplicates if unique_keys else None
        return json.loads(
            content.decode("utf-8-sig"), parse_constant=_finite, parse_float=_finite, object_pairs_hook=hook
        )
    except UnicodeDecodeError as error:
        raise UntrustedFileError(f"is not UTF-8 text (byte {error.start})") from error
    except RecursionError as error:
        raise UntrustedFileError("is not readable JSON: nested too deeply") from error
    except UntrustedFileError:
        raise
    except ValueError as error:  # JSONDecodeError, or an integer of thousands of digits
        raise UntrustedFileError(f"is not readable JSON: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UntrustedFileError(f"is not readable JSON: key given twice: {', '.join(twice)}")
    return content


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: it is missing or cannot be read.
        UntrustedFileError: see `read_bounded` and `parse_json`.
    """
    return parse_json(read_bounded(path, most_bytes))


def _finite(text: str) -> float:
    """JSON itself has neither NaN nor Infinity, but Python's parser takes both, and makes 1e999 infinite."""
    number = float(text)
    if not math.isfinite(number):
        raise UntrustedFileError(
            f"is not readable JSON: {text} is not a finite number: write a number, or leave the key out"
        )
    return number
