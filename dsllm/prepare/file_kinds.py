"""Says what a source's file contains: by its name, and by its first bytes where the name is wrong."""

import codecs
import re
from pathlib import Path
from typing import Literal, NamedTuple

Format = Literal["text", "json lines", "json", "parquet"]

FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".markdown": "text",
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".jsonlines": "json lines",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
}
"""By suffix, in lower case."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz", ".bz2": "bzip2", ".lz4": "lz4"}
"""By suffix, in lower case."""

HEAD_BYTES = 4096
"""How much of a file `content_compression` and `looks_like_text` need."""

_BEGINNINGS = (
    ("gzip", re.compile(rb"\x1f\x8b\x08")),
    ("zstd", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")),  # or a frame to skip, as pzstd writes it
    ("xz", re.compile(rb"\xfd7zXZ\x00")),
    ("bzip2", re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)")),
    ("lz4", re.compile(rb"\x04\x22\x4d\x18")),
)
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


class FileKind(NamedTuple):
    """What a file's name says."""

    format: Format
    compression: str | None
    """One of the values of `COMPRESSIONS`; None: not compressed."""


def kind_by_name(name: str) -> FileKind | None:
    """What a file contains by its suffixes, in any case; None if we do not read such files."""
    stem, suffix = _split(name.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression:
        _, suffix = _split(stem)
    file_format = FORMATS.get(suffix)
    if file_format is None or (compression and file_format == "parquet"):
        return None
    return FileKind(file_format, compression)


def type_of_name(name: str) -> str:
    """How files are counted that we do not read: by suffix, that of a compression with the one before it; or by name."""
    stem, suffix = _split(name)
    return (_split(stem)[1] if suffix.lower() in COMPRESSIONS else "") + suffix or name


def content_compression(head: bytes) -> str | None:
    """How a file is compressed, by its first bytes; None if it is not."""
    return next((name for name, beginning in _BEGINNINGS if beginning.match(head)), None)


def looks_like_text(head: bytes, encoding: str) -> bool:
    """Whether the first bytes of a file are text: printable, and valid in the encoding."""
    if _CONTROL.search(head) and is_ascii_compatible(encoding):
        return False
    try:
        codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def is_ascii_compatible(encoding: str) -> bool:
    """Whether a line end is one byte in the encoding, as in ASCII: so not in UTF-16."""
    return "a\n".encode(encoding) == b"a\n"


def _split(name: str) -> tuple[str, str]:
    path = Path(name)
    return path.stem, path.suffix
