"""Reads and writes token shards in Megatron's .bin/.idx format, version 1.

PREFIX.bin is the token ids and nothing else. PREFIX.idx, little endian: magic (9 bytes), version u64, code of the type
u8, number of sequences S u64, number of document starts D u64 (documents + 1), then i32[S] lengths in tokens, i64[S]
byte offsets into the .bin, i64[D] the sequence at which each document starts. Source: megatron-core 0.16.1,
core/datasets/indexed_dataset.py. The writer makes each document one sequence; the reader takes any number.
"""

import contextlib
import hashlib
import os
import struct
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np

from dsllm import files
from dsllm.data.shard_index import OVERFLOWED, IndexLayout, check_index
from dsllm.errors import DataError
from dsllm.untrusted_files import UntrustedFileError, check_regular

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # 34 bytes
DTYPE_OF_CODE = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
CODE_OF_DTYPE = {name: code for code, name in DTYPE_OF_CODE.items()}
MOST_UINT16_VOCAB = 65500  # Megatron's limit; it leaves room for ids that are added later
MOST_DOCUMENT_TOKENS = 2**31 - 1  # lengths are int32


def shard_dtype(vocab_size: int) -> np.dtype:
    """The type of a token id on disk: uint16 if the vocabulary fits, else int32 (Megatron's rule)."""
    return np.dtype(np.uint16 if vocab_size < MOST_UINT16_VOCAB else np.int32)


def bin_path(prefix: Path) -> Path:
    """The file of token ids."""
    return prefix.with_name(prefix.name + ".bin")  # with_suffix would cut a prefix such as en.v2


def idx_path(prefix: Path) -> Path:
    """The file of document boundaries."""
    return prefix.with_name(prefix.name + ".idx")


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """Size and checksum of a shard that was written."""

    num_tokens: int
    num_documents: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str


class ShardWriter:
    """Writes one shard under temporary names; `close` publishes it, the .idx last. A shard with an .idx is complete.

    As a context manager it closes on success, and removes what it has written on an exception.
    """

    def __init__(self, prefix: Path, dtype: np.dtype):
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self._range = np.iinfo(self.dtype)
        self._lengths = array("i")
        self._digest = hashlib.sha256()
        self._path = bin_path(prefix)
        self._info: ShardInfo | None = None
        try:
            prefix.parent.mkdir(parents=True, exist_ok=True)
            self._file = files.partial(self._path).open("wb")
        except OSError as error:
            raise _not_written(self._path, error) from error

    def add_document(self, token_ids: np.ndarray | Sequence[int]) -> None:
        """Append one document, with its end-of-text token.

        Args:
            token_ids: 1-D, at least one id.

        Raises:
            DataError: an id does not fit the shard's type, the document is too long for the format, or the disk is full.
        """
        ids = np.asarray(token_ids)
        assert ids.ndim == 1 and ids.size > 0, "a document has at least its end-of-text token"
        low, high = int(ids.min()), int(ids.max())
        if low < self._range.min or high > self._range.max:
            raise DataError(
                f"{self._path}: token ids {low} to {high} do not fit {self.dtype.name} "
                f"({self._range.min} to {self._range.max}): choose the type by shard_dtype(vocab_size)"
            )
        if ids.size > MOST_DOCUMENT_TOKENS:
            raise DataError(f"{self._path}: a document of {ids.size} tokens; the format allows {MOST_DOCUMENT_TOKENS}")
        content = ids.astype(self.dtype).tobytes()
        try:
            self._file.write(content)
        except OSError as error:
            raise _not_written(self._path, error) from error
        self._digest.update(content)
        self._lengths.append(ids.size)

    def close(self) -> ShardInfo:
        """Publish both files. A second call returns the same record again.

        Raises:
            DataError: the files could not be written; none of them remains.
        """
        if self._info is not None:
            return self._info
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        index = _index_bytes(lengths, self.dtype)
        try:
            self._file.close()
            # Next to the new .bin, an .idx of an earlier attempt would say that the shard is complete.
            idx_path(self.prefix).unlink(missing_ok=True)
            files.publish(self._path)
            files.write_atomically(idx_path(self.prefix), index)
        except OSError as error:
            self.discard()
            self._path.unlink(missing_ok=True)
            raise _not_written(self._path, error) from error
        num_tokens = int(lengths.sum(dtype=np.int64))
        self._info = ShardInfo(
            num_tokens=num_tokens,
            num_documents=len(lengths),
            bin_bytes=num_tokens * self.dtype.itemsize,
            idx_bytes=len(index),
            bin_sha256=self._digest.hexdigest(),
        )
        return self._info

    def discard(self) -> None:
        """Remove what was written."""
        with contextlib.suppress(OSError):  # closing writes what is buffered, which fails on a full disk
            self._file.close()
        files.partial(self._path).unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


class Shard:
    """One shard, open for reading. Opening reads 46 bytes, however large the shard is."""

    def __init__(self, prefix: Path):
        """Open PREFIX.bin and PREFIX.idx, and compare both sizes with the header.

        Raises:
            DataError: a file is missing, is not part of such a shard, or has the wrong size.
        """
        self.prefix = prefix
        self.path = bin_path(prefix)
        self._index_path = idx_path(prefix)
        header = _read_header(self._index_path)
        _check_regular(self.path)
        self.dtype = header.dtype
        self.num_documents = header.num_documents
        self.index_bytes = header.index_bytes
        self._num_sequences = header.num_sequences
        try:
            # Read calls instead of a memory map: if somebody cuts the file short during a run, a read fails with an error
            # that we can name, where a map would end the process by SIGBUS; and resident memory does not grow.
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be opened ({error.strerror}), but its .idx is there") from error
        weakref.finalize(self, os.close, self._descriptor)
        found = os.fstat(self._descriptor).st_size
        if found != header.bin_bytes and (found - header.bin_bytes) % 2**32 == 0:
            raise DataError(
                f"{self._index_path}: the last offset says that {self.path.name} has {header.bin_bytes} bytes, but it has "
                f"{found}: {OVERFLOWED}"
            )
        if found != header.bin_bytes:
            why = "truncated" if found < header.bin_bytes else "the .idx leaves its last documents out"
            raise DataError(
                f"{self.path}: {found} bytes, but {self._index_path.name} describes {header.bin_bytes}: "
                f"{why}, or not the pair of this .idx; copy or prepare it again"
            )
        self.bin_bytes = found
        self.num_tokens = found // self.dtype.itemsize

    def read(self, start: int, stop: int) -> np.ndarray:
        """The token ids [start, stop) as int64.

        Raises:
            DataError: the file has become shorter since it was opened, or the device fails.
        """
        assert 0 <= start <= stop <= self.num_tokens, f"tokens [{start}, {stop}) of {self.num_tokens}"
        size = self.dtype.itemsize
        try:
            content = _read_exactly(self._descriptor, start * size, (stop - start) * size)
        except OSError as error:
            raise DataError(f"{self.path}: tokens {start} to {stop} cannot be read: {error.strerror}") from error
        if len(content) != (stop - start) * size:
            end = start + len(content) // size
            raise DataError(f"{self.path}: ends at token {end}, but had {self.num_tokens} when it was opened")
        return np.frombuffer(content, dtype=self.dtype).astype(np.int64)

    @cached_property
    def document_offsets(self) -> np.ndarray:
        """Token at which each document starts, and the end: int64[num_documents + 1]. Reads the whole .idx.

        Raises:
            DataError: see `check_index`.
        """
        self.check_index()
        count = self._num_sequences
        starts = np.zeros(count + 1, dtype=np.int64)
        with self._index_path.open("rb") as file:
            file.seek(HEADER.size)
            np.cumsum(np.fromfile(file, dtype="<i4", count=count), dtype=np.int64, out=starts[1:])
            file.seek(8 * count, os.SEEK_CUR)
            documents = np.fromfile(file, dtype="<i8", count=self.num_documents + 1)
        return starts[documents]

    def check_index(self) -> None:
        """Check every entry of the .idx (`dsllm.data.shard_index`); reads the whole .idx.

        Raises:
            DataError: it is damaged, or does not describe the .bin from its first token to its last.
        """
        check_index(
            self._index_path,
            IndexLayout(
                header_bytes=HEADER.size,
                token_bytes=self.dtype.itemsize,
                num_sequences=self._num_sequences,
                num_documents=self.num_documents,
                num_tokens=self.num_tokens,
            ),
        )


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What the header and the last entries of an .idx say."""

    dtype: np.dtype
    num_sequences: int
    num_documents: int
    bin_bytes: int
    """Size that the .bin must have."""
    index_bytes: int
    """Size of the .idx."""


def _read_header(path: Path) -> _Header:
    """Read the header, and the place of the last sequence, whose end is the size of the .bin. Takes constant time.

    Raises:
        DataError: the file is missing, is not a Megatron index of version 1, or has the wrong size.
    """
    _check_regular(path)
    try:
        with path.open("rb") as file:
            content = file.read(HEADER.size)
            if not content.startswith(MAGIC):
                raise DataError(f"{path}: not a Megatron .idx: begins with {content[:9]!r} instead of {MAGIC!r}")
            if len(content) < HEADER.size:
                raise DataError(f"{path}: {len(content)} bytes, shorter than its header ({HEADER.size}): truncated")
            _, version, code, num_sequences, num_starts = HEADER.unpack(content)
            found = os.fstat(file.fileno()).st_size
            _check_header(path, version, code, 12 * num_sequences + 8 * num_starts, found)
            if num_starts == 0:
                raise DataError(
                    f"{path}: has no document starts, not even the 0 of an empty shard: damaged; prepare it again"
                )
            bin_bytes = 0
            if num_sequences > 0:
                file.seek(HEADER.size + 4 * (num_sequences - 1))
                (last_length,) = struct.unpack("<i", file.read(4))
                file.seek(HEADER.size + 4 * num_sequences + 8 * (num_sequences - 1))
                (last_offset,) = struct.unpack("<q", file.read(8))
                bin_bytes = last_offset + last_length * np.dtype(DTYPE_OF_CODE[code]).itemsize
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); a shard is a PREFIX.bin and PREFIX.idx") from error
    dtype = np.dtype(DTYPE_OF_CODE[code]).newbyteorder("<")
    return _Header(
        dtype=dtype,
        num_sequences=num_sequences,
        num_documents=num_starts - 1,
        bin_bytes=bin_bytes,
        index_bytes=found,
    )


def _check_header(path: Path, version: int, code: int, array_bytes: int, found: int) -> None:
    """Refuse a version, type or size that we cannot read."""
    if version != VERSION:
        raise DataError(f"{path}: Megatron index version {version}; dsllm reads version {VERSION}")
    name = DTYPE_OF_CODE.get(code)
    if name is None or name.startswith("float"):
        raise DataError(f"{path}: ids of type {name or f'code {code}'}: token ids are integers")
    expected = HEADER.size + array_bytes
    if found != expected:
        why = "truncated" if found < expected else "longer than its header says (multimodal shards are not read)"
        raise DataError(f"{path}: {found} bytes, its header describes {expected}: {why}; copy or prepare it again")


def _check_regular(path: Path) -> None:
    """Refuse a folder, a device or a pipe, whose opening could wait for ever. A missing file is left to the caller.

    Raises:
        DataError: it is one.
    """
    try:
        check_regular(path)
    except UntrustedFileError as error:
        raise DataError(f"{path}: {error}") from error
    except OSError:
        return


def _index_bytes(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    """The content of an .idx whose documents are one sequence each."""
    count = len(lengths)
    offsets = np.zeros(count, dtype="<i8")
    np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
    offsets *= dtype.itemsize
    starts = np.arange(count + 1, dtype="<i8")
    header = HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[dtype.name], count, len(starts))
    return b"".join([header, lengths.astype("<i4").tobytes(), offsets.tobytes(), starts.tobytes()])


def _read_exactly(descriptor: int, offset: int, num_bytes: int) -> bytes:
    """Read at an offset; returns less only at the end of the file."""
    # One call may return less than requested, most of all on network file systems.
    parts: list[bytes] = []
    while num_bytes > 0 and (part := os.pread(descriptor, num_bytes, offset)):
        parts.append(part)
        offset += len(part)
        num_bytes -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _not_written(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: could not be written: {error.strerror}; nothing was published")
