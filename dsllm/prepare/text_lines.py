"""Reads a source's file as numbered lines or as a whole: decompressed, and of any encoding."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, AnyStr, TypeAlias

from dsllm.prepare.decompress import DAMAGE, Decompressed
from dsllm.prepare.document import BadInput, Remark
from dsllm.prepare.file_kinds import (
    HEAD_BYTES,
    content_compression,
    is_ascii_compatible,
    kind_by_name,
    looks_like_text,
)
from dsllm.untrusted_files import GIT_LFS_POINTER

MOST_BYTES = 2**30
"""The longest document that is read, in bytes: it is in memory as a whole."""
DAMAGED = "cannot be read to its end: truncated or damaged"
TOO_LONG = f"longer than {MOST_BYTES >> 20:,} MiB"
_READ_BYTES = 2**18
Reader: TypeAlias = "io.BufferedReader[Any]"


@dataclass
class Position:
    """How much of the current file has been read."""

    file_bytes: int = 0
    """Bytes of the file on the disk, compressed if it is."""


class OpenFile:
    """One file of text, open for reading: made by `open_text`."""

    def __init__(self, path: Path, encoding: str, raw: Reader, stream: Reader):
        self.path = path
        self.encoding = encoding
        self.raw = raw
        self.stream = stream
        """The content, decompressed."""
        self.line_encoding = encoding if is_ascii_compatible(encoding) else "utf-8"
        """The encoding of what `lines` gives: a line end must be one byte."""

    def lines(self, position: Position) -> Iterator[tuple[int, bytes | BadInput]]:
        """Numbered lines with their line ends, which are LF, or CR in a file without LF; updates `position`.

        A line that is too long, and the end of a damaged file, is a `BadInput`.
        """
        number = 0
        try:
            for line in self._lines():
                number += 1
                if self.stream is self.raw:
                    position.file_bytes += len(line or b"")  # asking the file takes longer than reading a line
                else:
                    position.file_bytes = self.raw.tell()
                yield number, BadInput(f"{self.path}, line {number}", TOO_LONG) if line is None else line
        except UnicodeError as error:
            yield number + 1, BadInput(f"{self.path}, after line {number}", f"not {self.encoding}", first_line(error))
        except DAMAGE as error:
            yield number + 1, BadInput(f"{self.path}, after line {number}", DAMAGED, first_line(error))

    def content(self, position: Position) -> bytes | BadInput:
        """The whole content, in `encoding`; updates `position`."""
        parts: list[bytes] = []
        num_bytes = 0
        try:
            while part := self.stream.read(_READ_BYTES):
                parts.append(part)
                num_bytes += len(part)
                position.file_bytes = self.raw.tell()
                if num_bytes > MOST_BYTES:
                    return BadInput(str(self.path), TOO_LONG, "set text_documents: paragraphs or lines for this source")
        except DAMAGE as error:
            return BadInput(str(self.path), DAMAGED, first_line(error))
        return b"".join(parts)

    def remarks(self) -> Iterator[Remark]:
        """What there is to know about the file, once its end has been reached."""
        if isinstance(self.stream, Decompressed) and (extra := self.stream.num_trailing_bytes):
            yield Remark(str(self.path), "bytes behind the compressed data, ignored", f"{extra:,} bytes")

    def _lines(self) -> Iterator[bytes | None]:
        """The lines, in `line_encoding`; None for one that is too long."""
        through = self.encoding if self.encoding != self.line_encoding else "latin-1"
        head = self.stream.peek(_READ_BYTES)[:_READ_BYTES].decode(through, "ignore")
        # old Macs ended lines so; a CR at the end of what has been read may belong to a CRLF
        only_returns = "\r" in head.removesuffix("\r") and "\n" not in head
        if self.encoding == self.line_encoding and not only_returns:
            yield from _bounded(self.stream)
            return
        out = self.line_encoding if self.encoding != self.line_encoding else "latin-1"
        with io.TextIOWrapper(self.stream, through, newline=None if only_returns else "\n") as text:
            for line in _bounded(text):
                yield line if line is None else line.encode(out)


def _bounded(stream: IO[AnyStr]) -> Iterator[AnyStr | None]:
    """The lines of a stream; None for one that is too long."""
    while line := stream.readline(MOST_BYTES):
        if not _is_cut(line):
            yield line
            continue
        yield None
        while _is_cut(line):
            line = stream.readline(MOST_BYTES)


def _is_cut(line: str | bytes) -> bool:
    """Whether a line continues after the most bytes that are read at once."""
    return len(line) == MOST_BYTES and line[-1] not in ("\n", ord("\n"))


@contextlib.contextmanager
def open_text(path: Path, encoding: str) -> Iterator[tuple[OpenFile | BadInput, list[Remark]]]:
    """Open a file whose content is text, compressed or not: by its content where that is not what the name says.

    Yields:
        the file, or why it is not read; and remarks on it.

    Raises:
        OSError: it cannot be opened.
    """
    with io.BufferedReader(io.FileIO(path), _READ_BYTES) as raw:
        head = raw.peek(HEAD_BYTES)[:HEAD_BYTES]
        kind = kind_by_name(path.name)
        by_name, by_content = kind.compression if kind else None, content_compression(head)
        compression, remarks = by_content or by_name, []
        if by_content is None and by_name and looks_like_text(head, encoding):
            compression = None
        if compression != by_name:
            really = f"compressed by {compression}" if compression else "not compressed"
            remarks.append(Remark(str(path), "compressed in another way than its name says", f"it is {really}"))
        if compression is None:
            yield _checked(OpenFile(path, encoding, raw, raw)), remarks
            return
        with Decompressed(raw, compression) as stream:
            yield _checked(OpenFile(path, encoding, raw, stream)), remarks


def _checked(file: OpenFile) -> OpenFile | BadInput:
    """The file, or why its beginning shows that it should not be read."""
    try:
        head = file.stream.peek(HEAD_BYTES)[:HEAD_BYTES]
    except DAMAGE as error:
        return BadInput(f"{file.path}, after line 0", DAMAGED, first_line(error))
    if head.startswith(GIT_LFS_POINTER):
        return BadInput(str(file.path), "a Git LFS pointer instead of the file", "run `git lfs pull` in its repository")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) and file.encoding == "utf-8":
        return BadInput(
            str(file.path),
            "not UTF-8",
            "it begins with the byte order mark of UTF-16: set encoding: utf-16 for the source",
        )
    return file


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
