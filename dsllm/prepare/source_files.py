"""Finds a source's files and reads documents from .txt, .jsonl (.gz, .zst) and .parquet, a few at a time."""

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
    """How much of the current file has been read."""

    file_bytes: int = 0
    """Bytes of the file on the disk, compressed if it is."""


def find_files(source: SourceConfig) -> tuple[list[Path], Counter[str]]:
    """The files named by a source's paths, in order, each once; and the number of files of other types, by suffix.

    Folders are searched recursively, sorted by name; names that begin with a dot are skipped.

    Raises:
        DataError: a path does not exist, a glob matches nothing, or there is no file of a type that we read.
    """
    found: list[Path] = []
    ignored: Counter[str] = Counter()
    for pattern in source.paths:
        candidates = _candidates(pattern, source.name)
        read = [path for path in candidates if path.name.endswith(SUFFIXES)]
        others = Counter(path.suffix or path.name for path in candidates if not path.name.endswith(SUFFIXES))
        ignored += others
        if not read:
            other_types = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())
            raise DataError(
                f"source '{source.name}': {pattern} has no file of a type that dsllm reads ({', '.join(SUFFIXES)})"
                + (f", but {other_types}: convert them, or name other files" if other_types else "")
            )
        found += read
    return list(dict.fromkeys(found)), ignored


def read_documents(path: Path, source: SourceConfig, position: Position) -> Iterator[Document | BadInput]:
    """Read the documents of one file, updating `position`; a problem is yielded as `BadInput`."""
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
    """Size of a file in bytes; 0 if it cannot be found out (reading the file will report that)."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def document_in(record: Any, text_field: str, origin: str) -> Document | BadInput:
    """The document in a record, which must be a dict with a string under `text_field`."""
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
    """Each line, or each run of lines between empty lines, without the line end after it."""
    parts: list[bytes] = []
    start = 0
    for number, line in _lines(path, position):
        assert isinstance(line, bytes), "only compressed files yield BadInput"
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
            yield Document("", origin)  # will be counted as empty
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
        hint = "; a JSON array cannot be read: write one object per line" if line.lstrip().startswith(b"[") else ""
        return BadInput(origin, "not valid JSON", f"{error}{hint}")
    return document_in(record, text_field, origin)


def _lines(path: Path, position: Position) -> Iterator[tuple[int, bytes | BadInput]]:
    """Numbered lines, decompressed, with their line ends; the last item of a damaged file is a `BadInput`."""
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
        # pyarrow reads many frames as one stream and reports a truncated one; the reader of zstandard just ends.
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
    """The values of a string column as bytes, so that one value that is not UTF-8 does not fail its whole batch."""
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
    """Decode a text unchanged, except that a byte order mark at the beginning of a file is dropped."""
    try:
        return Document(content.decode("utf-8-sig" if first else "utf-8"), origin)
    except UnicodeDecodeError as error:
        return BadInput(origin, "not UTF-8", f"byte {error.start} is {content[error.start]:#04x}")


def _candidates(pattern: str, source: str) -> list[Path]:
    """The files of any type that a path or glob names."""
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
    """Files below a folder, sorted by name; follows links, but visits each folder once."""
    seen: set[str] = set()
    for place, subfolders, names in os.walk(folder, onerror=_not_listed, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def _not_listed(error: OSError) -> None:
    raise DataError(f"{error.filename}: this folder cannot be listed: {error.strerror}") from error


def _type_name(value: Any) -> str:
    return "null" if value is None else type(value).__name__
