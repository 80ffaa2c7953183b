"""Cuts the stream of documents into units of work: each is spooled to a file and becomes one token shard."""

import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dsllm.errors import DataError

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Consecutive documents of one source and split, kept in a spool file until they are tokenised."""

    source: str
    split: str
    """train or validation."""
    number: int
    spool: Path
    num_documents: int
    text_bytes: int
    documents_sha256: str
    """SHA-256 over the hashes of the documents in order: equal for equal documents, whatever file they came from."""

    @property
    def name(self) -> str:
        """Name of its token shard, without .bin or .idx."""
        return unit_name(self.source, self.split, self.number)


def unit_name(source: str, split: str, number: int) -> str:
    """Name of a unit's token shard, without .bin or .idx."""
    return f"{split}-{source}-{number:05d}"


def spool_path(folder: Path, name: str) -> Path:
    """The spool file of the unit of this name."""
    return folder / f"{name}.spool"


class UnitCutter:
    """Spools the documents of one source and split, and completes a unit as soon as it has enough text."""

    def __init__(self, folder: Path, source: str, split: str, unit_bytes: int):
        self._folder, self._source, self._split, self._unit_bytes = folder, source, split, unit_bytes
        self._number = 0
        self._file: IO[bytes] | None = None
        self._start()

    def add(self, content: bytes, digest: bytes) -> Unit | None:
        """Append a document (UTF-8) and its SHA-256; returns a unit if this completes one."""
        if self._file is None:
            self._file = self._path.open("wb")
        self._file.write(_LENGTH.pack(len(content)))
        self._file.write(content)
        self._num_documents += 1
        self._text_bytes += len(content)
        self._hash.update(digest)
        return self._cut() if self._text_bytes >= self._unit_bytes else None

    def finish(self) -> Unit | None:
        """The last unit, if any documents remain."""
        return self._cut() if self._num_documents else None

    def close(self) -> None:
        """Close the open file."""
        if self._file is not None:
            self._file.close()

    @property
    def _path(self) -> Path:
        return spool_path(self._folder, unit_name(self._source, self._split, self._number))

    def _start(self) -> None:
        self._file = None
        self._num_documents = self._text_bytes = 0
        self._hash = hashlib.sha256()

    def _cut(self) -> Unit:
        assert self._file is not None, "a unit has documents"
        self._file.close()
        unit = Unit(
            source=self._source,
            split=self._split,
            number=self._number,
            spool=self._path,
            num_documents=self._num_documents,
            text_bytes=self._text_bytes,
            documents_sha256=self._hash.hexdigest(),
        )
        self._number += 1
        self._start()
        return unit


def spooled_documents(spool: Path) -> Iterator[bytes]:
    """Read the documents of a spool file, as UTF-8, in order.

    Raises:
        DataError: it has changed since it was written.
        OSError: it cannot be read.
    """
    with spool.open("rb") as file:
        num_left = os.fstat(file.fileno()).st_size
        while header := file.read(_LENGTH.size):
            num_left -= len(header)
            length = _LENGTH.unpack(header)[0] if len(header) == _LENGTH.size else num_left + 1
            if length > num_left:
                raise changed(spool)
            num_left -= length
            yield file.read(length)


def changed(spool: Path) -> DataError:
    """The error that a spool file is not as it was written."""
    return DataError(f"{spool}: changed while it waited to be tokenised: check the disk, and start again")
