"""Decompresses a stream as it is read: gzip, bzip2, xz with any number of members; zstd, lz4 with any number of frames."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any, Protocol

import pyarrow

_READ_BYTES = 2**18
_BUFFER_BYTES = 2**18
_XZ_MEMORY_BYTES = 2**30  # xz -9 needs 65 MiB; a damaged header can ask for any number

DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
"""What reading a truncated or damaged file raises."""


class _Decoder(Protocol):
    """Decompresses one member; as bz2.BZ2Decompressor and lzma.LZMADecompressor do."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _GzipDecoder:
    """zlib's decoder for one gzip member, with the methods of the other two."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def needs_input(self) -> bool:
        return not self._decoder.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)


_MEMBERS: dict[str, tuple[Callable[[], _Decoder], bytes, bytes]] = {
    "gzip": (_GzipDecoder, b"\x1f\x8b", b"\x1f\x8b\x08"),
    "bzip2": (bz2.BZ2Decompressor, b"BZh", b"1AY&SY"),
    "xz": (lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY_BYTES), b"\xfd7zXZ\x00", b"\xfd7zXZ\x00"),
}
"""The decoder of a member, how a member begins, and bytes by which one is found behind damage."""


class _Members(io.RawIOBase):
    """The content of a file of one or more compressed members.

    Zeros behind a member are padding. Other bytes behind the last member are counted and left out, as gzip does, unless a
    further member can be among them: then text is missing.
    """

    def __init__(self, raw: IO[bytes], compression: str):
        self._raw = raw
        self._new, self._beginning, self._mark = _MEMBERS[compression]
        self._decoder = self._new()
        self._pending = b""  # read from the file, not yet decoded
        self._ended = False
        self.num_trailing_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with decompressed bytes, at least one; returns 0 at the end.

        Raises:
            OSError, EOFError, zlib.error, lzma.LZMAError: the file is truncated or damaged.
        """
        while not self._ended:
            if self._decoder.eof:
                self._next_member()
                continue
            hungry = self._decoder.needs_input
            data = self._more() if hungry else b""
            part = self._decoder.decompress(data, len(buffer))
            if part:
                buffer[: len(part)] = part
                return len(part)
            if hungry and not data and not self._decoder.eof:
                raise EOFError("the file ends inside the compressed data")
        return 0

    def _more(self) -> bytes:
        data, self._pending = self._pending or self._raw.read(_READ_BYTES), b""
        return data

    def _next_member(self) -> None:
        """Begin the next member, or note that there is none."""
        rest = self._decoder.unused_data.lstrip(b"\0")
        while len(rest) < len(self._mark) and (more := self._raw.read(_READ_BYTES)):
            rest = (rest + more).lstrip(b"\0")
        if rest.startswith(self._beginning):
            self._decoder, self._pending = self._new(), rest
            return
        if rest and self._beginning.startswith(rest):
            raise EOFError("the file ends at the beginning of a further compressed member")
        self._ended = True
        while rest:
            if self._mark in rest:
                raise OSError("bytes that are not compressed data stand before a further compressed member")
            self.num_trailing_bytes += len(rest)
            overlap = rest[-len(self._mark) + 1 :]
            more = self._raw.read(_READ_BYTES)
            self.num_trailing_bytes -= len(overlap) if more else 0
            rest = overlap + more if more else b""


class Decompressed(io.BufferedReader):
    """The content of a compressed stream, as a buffered binary file."""

    def __init__(self, raw: IO[bytes], compression: str):
        """Open a stream.

        Args:
            compression: one of the values of `file_kinds.COMPRESSIONS`.
        """
        # pyarrow reads many frames as one stream and reports a truncated one; the reader of zstandard just ends.
        members = _Members(raw, compression) if compression in _MEMBERS else None
        stream: Any = members or pyarrow.CompressedInputStream(raw, compression)
        super().__init__(stream, _BUFFER_BYTES)
        self._members = members

    @property
    def num_trailing_bytes(self) -> int:
        """Bytes behind the compressed data that are left out; complete at the end of the stream."""
        return self._members.num_trailing_bytes if self._members else 0
