"""Checks a shard's .idx entry by entry: a .bin is read as one stream, so its .idx must describe all of it, in order."""

from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from dsllm.errors import DataError

OVERFLOWED = (
    "it has overflowed 32 bits, as in some versions of Megatron's tools (NVIDIA/Megatron-LM issue 1672): write the .idx again "
    "from the lengths, or prepare the shard again"
)
_PART = 2**20
"""Entries that are read at once."""
_AGAIN = "damaged; copy or prepare it again"


@dataclass(frozen=True, kw_only=True)
class IndexLayout:
    """What the header of an .idx and the size of its .bin say."""

    header_bytes: int
    token_bytes: int
    num_sequences: int
    num_documents: int
    num_tokens: int
    """Of the .bin."""


def check_index(path: Path, layout: IndexLayout) -> None:
    """Check every entry of an .idx, in parts.

    Raises:
        DataError: an offset has overflowed, parts of the .bin are left out or in another order, or an entry is damaged.
    """
    try:
        with path.open("rb") as file:
            _check_sequences(path, file, layout)
            _check_documents(path, file, layout)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _check_sequences(path: Path, file: IO[bytes], layout: IndexLayout) -> None:
    count, end = layout.num_sequences, 0
    for first in range(0, count, _PART):
        size = min(_PART, count - first)
        lengths = _entries(path, file, layout.header_bytes + 4 * first, "<i4", size).astype(np.int64)
        offsets = _entries(path, file, layout.header_bytes + 4 * count + 8 * first, "<i8", size)
        ends = end + np.cumsum(lengths)
        expected = (ends - lengths) * layout.token_bytes
        wrong = np.flatnonzero((offsets != expected) | (lengths < 0))
        if wrong.size:
            i = int(wrong[0])
            raise DataError(
                f"{path}: sequence {first + i} of {count} {_problem(int(lengths[i]), int(offsets[i]), int(expected[i]))}"
            )
        end = int(ends[-1])
    if end != layout.num_tokens:
        raise DataError(
            f"{path}: describes {end} of the {layout.num_tokens} tokens in its .bin: the others would be trained on without "
            "being a document; copy or prepare the shard again"
        )


def _problem(length: int, offset: int, expected: int) -> str:
    """What is wrong with a sequence."""
    if length < 0:
        return f"has the length {length}: {_AGAIN}"
    problem = f"begins at byte {offset}, but the lengths of those before it give {expected}"
    if (offset - expected) % 2**32 == 0:
        return f"{problem}: {OVERFLOWED}"
    return (
        f"{problem}: the .idx leaves parts of its .bin out, or has them in another order, and dsllm reads a .bin from its "
        "first token to its last: write a .bin of the documents to keep, with its .idx"
    )


def _check_documents(path: Path, file: IO[bytes], layout: IndexLayout) -> None:
    count, before, num_starts = layout.num_sequences, 0, layout.num_documents + 1
    for first in range(0, num_starts, _PART):
        size = min(_PART, num_starts - first)
        starts = _entries(path, file, layout.header_bytes + 12 * count + 8 * first, "<i8", size)
        falls = np.concatenate([[before], starts[:-1]]) > starts
        wrong = np.flatnonzero(falls | (starts > count) | (starts < 0))
        if wrong.size or (first == 0 and starts[0] != 0):
            i = int(wrong[0]) if wrong.size else 0
            where = f"{path}: document {first + i} of {layout.num_documents}"
            raise DataError(f"{where} starts at sequence {starts[i]} of {count}: {_AGAIN}")
        before = int(starts[-1])
    if before != count:
        raise DataError(
            f"{path}: its documents end at sequence {before} of {count}, so the others belong to no document: {_AGAIN}"
        )


def _entries(path: Path, file: IO[bytes], offset: int, dtype: str, count: int) -> np.ndarray:
    file.seek(offset)
    found = np.fromfile(file, dtype=dtype, count=count)
    if len(found) != count:
        raise DataError(f"{path}: has become shorter while it was read")
    return found
