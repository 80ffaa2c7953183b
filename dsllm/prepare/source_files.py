"""Reads the documents of one file of a source: text, JSON and Parquet, by what the file is."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from dsllm.config.data import SourceConfig
from dsllm.prepare.document import BadInput, Document, Item, Remark
from dsllm.prepare.file_kinds import kind_by_name
from dsllm.prepare.read_json import not_decoded, read_json, read_json_lines
from dsllm.prepare.read_parquet import read_parquet
from dsllm.prepare.text_lines import MOST_BYTES, TOO_LONG, OpenFile, Position, open_text
from dsllm.untrusted_files import UntrustedFileError, check_regular

EMPTY = "empty file, passed over"
"""The remark on a file without content, as a job leaves it that had no rows for one of its parts."""
_PARQUET = b"PAR1"


def read_documents(path: Path, source: SourceConfig, position: Position) -> Iterator[Item]:
    """Read the documents of one file, updating `position`; a problem is yielded as `BadInput`."""
    num_items = 0
    try:
        if check_regular(path) > 0:
            for item in _read(path, source, position):
                num_items += not isinstance(item, Remark)
                yield item
        if num_items == 0:
            yield Remark(str(path), EMPTY)
    except UntrustedFileError as error:
        yield BadInput(str(path), "not a file", str(error))
    except OSError as error:
        yield BadInput(str(path), "cannot be opened", error.strerror or str(error))


def size_of(path: Path) -> int:
    """Size of a file in bytes; 0 if it cannot be found out (reading the file will report that)."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: Path, source: SourceConfig, position: Position) -> Iterator[Item]:
    kind = kind_by_name(path.name)
    assert kind is not None, "find_files gives files that we read"
    if kind.format == "parquet" or (kind.format != "text" and _is_parquet(path)):
        yield from read_parquet(path, source.text_field, position)
        return
    with open_text(path, codecs.lookup(source.encoding).name) as (file, remarks):
        yield from remarks
        if isinstance(file, BadInput):
            yield file
            return
        if kind.format == "json lines":
            yield from read_json_lines(file, source.text_field, position)
        elif kind.format == "json":
            yield from read_json(file, source.text_field, position)
        elif source.text_documents == "file":
            yield from _read_text(file, position)
        else:
            yield from _read_text_parts(file, source.text_documents, position)
        yield from file.remarks()


def _is_parquet(path: Path) -> bool:
    """Whether a file named .json is Parquet by its first bytes."""
    with path.open("rb") as file:
        return file.read(len(_PARQUET)) == _PARQUET


def _read_text(file: OpenFile, position: Position) -> Iterator[Document | BadInput]:
    content = file.content(position)
    if isinstance(content, BadInput):
        yield content
    elif content:
        yield _decoded(content, str(file.path), file.encoding, first=True)


def _read_text_parts(file: OpenFile, unit: str, position: Position) -> Iterator[Document | BadInput]:
    """Each line, or each run of lines between empty lines, without the line end after it."""
    parts: list[bytes] = []
    start = num_bytes = 0
    for number, line in file.lines(position):
        if isinstance(line, BadInput):
            if parts:
                yield _part(file, parts, start)
            yield line
            parts = []
            continue
        if line.strip():
            start, num_bytes = (start, num_bytes + len(line)) if parts else (number, len(line))
            if num_bytes <= MOST_BYTES:
                parts.append(line)
        if parts and (unit == "lines" or not line.strip()):
            yield _part(file, parts, start) if num_bytes <= MOST_BYTES else _too_long(file, start)
            parts = []
    if parts:
        yield _part(file, parts, start) if num_bytes <= MOST_BYTES else _too_long(file, start)


def _part(file: OpenFile, parts: list[bytes], start: int) -> Document | BadInput:
    content = b"".join(parts).rstrip(b"\r\n")
    return _decoded(content, f"{file.path}, line {start}", file.line_encoding, first=start == 1)


def _too_long(file: OpenFile, start: int) -> BadInput:
    return BadInput(f"{file.path}, line {start}", TOO_LONG, "set text_documents: lines for this source")


def _decoded(content: bytes, origin: str, encoding: str, first: bool = False) -> Document | BadInput:
    """Decode a text unchanged, except that a byte order mark at the beginning of a file is dropped."""
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        return not_decoded(content, encoding, origin, error)
    return Document(text.removeprefix("\ufeff") if first else text, origin)
