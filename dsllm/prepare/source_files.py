"""Finds a source's files and reads documents from .txt, .jsonl (also .gz, .zst) and .parquet, few at a time."""

import glob
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from dsllm.config.data import SourceConfig
from dsllm.errors import DataError
from dsllm.prepare.document import BadInput, Document

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
SUFFIXES = (".txt", *JSON_LINES, ".parquet")
_PARQUET_ROWS = 256  # rows in memory at a time
_DAMAGED = "cannot be read to its end: truncated or damaged"


@dataclass
class Position:
    """How far reading has come within the current file."""

    file_bytes: int = 0
    """Bytes of the file on the disk that were consumed."""


def find_files(source: SourceConfig) -> tuple[list[Path], Counter[str]]:
    """The files that a source's paths mean, in order, each once; and how many others lay beside them, by suffix.

    Folders are searched to the bottom, in the order of names; what begins with a dot is passed over.

    Raises:
        DataError: a path, folder or glob that matches nothing, or a file of a type that is not read.
    """
    found: list[Path] = []
    ignored: Counter[str] = Counter()
    for pattern in source.paths:
        candidates = _candidates(pattern, source.name)
        read = [path for path in candidates if path.name.endswith(SUFFIXES)]
        ignored.update(path.suffix or path.name for path in candidates if not path.name.endswith(SUFFIXES))
        if not read:
            beside = ", ".join(f"{count} {suffix}" for suffix, count in ignored.most_common())
            raise DataError(
                f"source '{source.name}': {pattern} holds no file that is read ({', '.join(SUFFIXES)})"
                + (f", but {beside}: convert them, or name other files" if beside else "")
            )
        found += read
    return list(dict.fromkeys(found)), ignored


def read_documents(path: Path, source: SourceConfig, position: Position) -> Iterator[Document | BadInput]:
    """The documents of one file; `position` is kept up to date. Problems are yielded, not raised."""
    num_items = 0
    try:
        if path.stat().st_size > 0:
            for item in _reader(path, source, position):
                num_items += 1
                yield item
        if num_items == 0:
            yield BadInput(str(path), "empty file")
    except OSError as error:
        yield BadInput(str(path), "cannot be opened", error.strerror or str(error))


def size_of(path: Path) -> int:
    """Size of a file in bytes; 0 where it cannot be told, which reading it will report."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def document_in(record: Any, text_field: str, origin: str) -> Document | BadInput:
    """The document in a record: a mapping with a string under `text_field`."""
    if not isinstance(record, dict):
        return BadInput(origin, "not a JSON object", f"it is {_type_name(record)}")
    if text_field not in record:
        return BadInput(origin, f"no field '{text_field}'", f"its fields: {', '.join(map(str, record)) or 'none'}")
    text = record[text_field]
    if not isinstance(text, str):
        return BadInput(origin, f"field '{text_field}' is not a string", f"it is {_type_name(text)}")
    return Document(text, origin)


def _reader(path: Path, source: SourceConfig, position: Position) -> Iterator[Document | BadInput]:
    if path.name.endswith(".parquet"):
        return _read_parquet(path, source.text_field, position)
    if path.name.endswith(JSON_LINES):
        return _read_json_lines(path, source.text_field, position)
    if source.text_documents == "file":
        return _read_text(path)
    return _read_text_parts(path, source.text_documents, position)


def _read_text(path: Path) -> Iterator[Document | BadInput]:
    yield _decoded(path.read_bytes(), str(path), first=True)


def _read_text_parts(path: Path, unit: str, position: Position) -> Iterator[Document | BadInput]:
    """Lines, or runs of lines between empty ones; without the line ends around them."""
    parts: list[bytes] = []
    start = 0
    for number, line in _lines(path, position):
        assert isinstance(line, bytes), "a plain file has no damaged end"
        if line.strip():
            start = start if parts else number
            parts.append(line)
        if parts and (unit == "lines" or not line.strip()):
            yield _decoded(b"".join(parts).rstrip(b"\r\n"), f"{path}, line {start}", first=start == 1)
            parts = []
    if parts:
        yield _decoded(b"".join(parts).rstrip(b"\r\n"), f"{path}, line {start}", first=start == 1)


def _read_json_lines(path: Path, text_field: str, position: Position) -> Iterator[Document | BadInput]:
    for number, line in _lines(path, position):
        origin = f"{path}, line {number}"
        if isinstance(line, BadInput):
            yield line
        elif not line.strip():
            yield Document("", origin)  # counted as empty
        else:
            yield _parsed(line, text_field, origin, first=number == 1)


def _parsed(line: bytes, text_field: str, origin: str, first: bool) -> Document | BadInput:
    try:
        record = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return BadInput(origin, "not UTF-8", f"byte {error.start} of the line is {line[error.start]:#04x}")
    except (ValueError, RecursionError) as error:
        if not line.endswith(b"\n"):
            return BadInput(origin, "the file ends in the middle of a line")
        hint = "; a JSON array is not read: write one object per line" if line.lstrip().startswith(b"[") else ""
        return BadInput(origin, "not valid JSON", f"{error}{hint}")
    return document_in(record, text_field, origin)


def _lines(path: Path, position: Position) -> Iterator[tuple[int, bytes | BadInput]]:
    """Numbered lines with their ends, decompressed; a damaged file's last item says so."""
    number = 0
    with path.open("rb") as raw, _decompressed(path, raw) as stream:
        try:
            for line in stream:
                number += 1
                position.file_bytes = raw.tell() if stream is not raw else position.file_bytes + len(line)
                yield number, line
        except (OSError, EOFError, zlib.error) as error:
            yield number + 1, BadInput(f"{path}, after line {number}", _DAMAGED, str(error))


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if path.name.endswith(".zst"):
        # pyarrow, because it reads many frames as one stream and reports a cut one; zstandard's reader just ends.
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    return raw


def _read_parquet(path: Path, text_field: str, position: Position) -> Iterator[Document | BadInput]:
    row, num_rows, num_bytes = 0, 0, path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            num_rows = file.metadata.num_rows
            problem = _schema_problem(file.schema_arrow, text_field, str(path))
            if problem is not None:
                yield problem
                return
            for row, content in enumerate(_values(file, text_field), start=1):
                position.file_bytes = num_bytes * row // num_rows
                yield _row(content, text_field, f"{path}, row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        lost = f"{num_rows - row} rows are lost: " if num_rows else ""
        yield BadInput(f"{path}, after row {row}", _DAMAGED, lost + str(error).splitlines()[0])


def _values(file: pyarrow.parquet.ParquetFile, text_field: str) -> Iterator[bytes | None]:
    """A string column's values undecoded: one value that is not UTF-8 must not spoil its batch."""
    for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field]):
        column = batch.column(0)
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        is_large = pyarrow.types.is_large_string(column.type)
        yield from column.cast(pyarrow.large_binary() if is_large else pyarrow.binary()).to_pylist()


def _schema_problem(schema: pyarrow.Schema, text_field: str, origin: str) -> BadInput | None:
    if text_field not in schema.names:
        return BadInput(origin, f"no field '{text_field}'", f"its columns: {', '.join(schema.names)}")
    kind = schema.field(text_field).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        return BadInput(origin, f"field '{text_field}' is not a string", f"it is {kind}")
    return None


def _row(content: bytes | None, text_field: str, origin: str) -> Document | BadInput:
    if content is None:
        return BadInput(origin, f"field '{text_field}' is not a string", "it is null")
    return _decoded(content, origin)


def _decoded(content: bytes, origin: str, first: bool = False) -> Document | BadInput:
    """A text; at the beginning of a file a byte order mark is dropped, and nothing else is changed."""
    try:
        return Document(content.decode("utf-8-sig" if first else "utf-8"), origin)
    except UnicodeDecodeError as error:
        return BadInput(origin, "not UTF-8", f"byte {error.start} is {content[error.start]:#04x}")


def _candidates(pattern: str, source: str) -> list[Path]:
    """The files that a path or glob means, of any type."""
    path = Path(pattern).expanduser()
    if path.exists():
        places = [path]
    elif glob.has_magic(pattern):
        places = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    else:
        raise DataError(f"source '{source}': {pattern}: no such file or folder (working directory {Path.cwd()})")
    if not places:
        raise DataError(f"source '{source}': {pattern} matches nothing (working directory {Path.cwd()})")
    files = [file for place in places for file in (_walk(place) if place.is_dir() else [place])]
    return list(dict.fromkeys(files))


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder in the order of their names; links are followed, each folder once."""
    seen: set[str] = set()
    for place, subfolders, names in os.walk(folder, onerror=_not_listed, followlinks=True):
        seen.add(os.path.realpath(place))
        links = [name for name in subfolders if os.path.realpath(os.path.join(place, name)) in seen]
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name not in links)
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def _not_listed(error: OSError) -> None:
    raise DataError(f"{error.filename}: this folder cannot be listed: {error.strerror}") from error


def _type_name(value: Any) -> str:
    return "null" if value is None else type(value).__name__
