"""A file's name says what it is, and its first bytes whether and how it is compressed."""

import bz2
import gzip
import lzma

import pyarrow as pa
import pytest
import zstandard

from dsllm.prepare.file_kinds import (
    FileKind,
    content_compression,
    kind_by_name,
    looks_like_text,
    type_of_name,
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", FileKind("text", None)),
        ("A.B.MD.Gz", FileKind("text", "gzip")),
        ("part-0.c000.json.gz", FileKind("json", "gzip")),
        ("a.jsonl.zstd", FileKind("json lines", "zstd")),
        ("part-0.snappy.parquet", FileKind("parquet", None)),
        *((name, None) for name in ("a.csv", "a.gz", "a.tar.gz", "a.parquet.gz", "a.txt~", "txt", "a", "_SUCCESS")),
    ],
)
def test_the_name_says_what_a_file_is(name: str, kind: FileKind | None):
    assert kind_by_name(name) == kind


def test_other_files_are_counted_by_suffix_or_name():
    names = ("a.csv", "b.tar.gz", "c.gz", "_SUCCESS", "d.")
    assert [type_of_name(name) for name in names] == [".csv", ".tar.gz", ".gz", "_SUCCESS", "d."]


def test_first_bytes_show_the_compression():
    written = {
        "gzip": gzip.compress(b"x"),
        "zstd": zstandard.compress(b"x"),
        "xz": lzma.compress(b"x"),
        "bzip2": bz2.compress(b"x"),
        "lz4": pa.compress(b"x", "lz4", asbytes=True),
    }
    assert {name: content_compression(content) for name, content in written.items()} == {name: name for name in written}
    assert content_compression(bz2.compress(b"")) == "bzip2"
    assert content_compression(b"\x50\x2a\x4d\x18\4\0\0\0pzst" + zstandard.compress(b"x")) == "zstd"  # a frame to skip
    assert [content_compression(text) for text in (b"", b"BZh9 is a name", b"\x1f", b"PK\3\4")] == [None] * 4


def test_text_is_printable_and_valid_in_its_encoding():
    assert looks_like_text("é\t\r\n\x1b[0m".encode(), "utf-8") and looks_like_text("é".encode()[:1], "utf-8")
    assert not looks_like_text(b"a\0b", "latin-1") and not looks_like_text(b"\xff", "utf-8")
    assert looks_like_text("ab".encode("utf-16"), "utf-16")
