"""What may happen to a file of a folder: it is cut, altered, replaced by something that is no file, or gone."""

import os
import random
from collections.abc import Callable
from pathlib import Path

NO_FILES = ("fifo", "/dev/zero", "folder", "loop")
"""What may be in a file's place. Opening the first would wait for ever, and reading the second would not end."""


def put_in_place(path: Path, kind: str) -> None:
    """Replace a file by one of NO_FILES: a pipe, a link to a device, a folder, or a link to itself."""
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "loop" else kind)


def truncate(path: Path, source: random.Random) -> None:
    """Cut a file at a random place."""
    os.truncate(path, source.randrange(path.stat().st_size))


def flip(path: Path, source: random.Random) -> None:
    """Change one random bit of a file."""
    content, bit = bytearray(path.read_bytes()), source.randrange(8 * path.stat().st_size)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path, random.Random], object]] = {
    "truncated": truncate,
    "flipped": flip,
    "empty": lambda path, source: path.write_bytes(b""),
    "wrong type": lambda path, source: path.write_text("[1, 2, 3]"),
    "noise": lambda path, source: path.write_bytes(source.randbytes(path.stat().st_size)),
    "absent": lambda path, source: path.unlink(),
    "folder": lambda path, source: put_in_place(path, "folder"),
    "fifo": lambda path, source: put_in_place(path, "fifo"),
    "device": lambda path, source: put_in_place(path, "/dev/zero"),
    "link to itself": lambda path, source: put_in_place(path, "loop"),
    "longer": lambda path, source: path.write_bytes(path.read_bytes() + source.randbytes(8)),
    "huge": lambda path, source: os.truncate(path, 2**41),
    "deep": lambda path, source: path.write_text("[" * 200_000),
}
"""By name: damages a file at random places."""
