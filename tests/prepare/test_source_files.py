"""Every format gives the same documents, and each input that cannot be read is reported with its place."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from dsllm.config.data import SourceConfig
from dsllm.prepare.document import BadInput, Document, Item, Remark
from dsllm.prepare.source_files import EMPTY, read_documents
from dsllm.prepare.text_lines import Position

TEXTS = ["one\ntwo", "é 你 😀", "  indented\r\n", "x" * 5000]


def read(path: Path, **fields: object) -> list[Item]:
    return list(read_documents(path, SourceConfig(name="s", **fields), Position()))


def texts_in(path: Path, **fields: object) -> list[str]:
    items = read(path, **fields)
    assert all(isinstance(item, Document) for item in items), items
    return [item.text for item in items]


def json_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "other": 1}).encode() + b"\n" for text in texts)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_table(path: Path, column: pa.Array, name: str = "text") -> Path:
    pyarrow.parquet.write_table(pa.table({"number": list(range(len(column))), name: column}), path, row_group_size=2)
    return path


def only(items: list[Item]) -> BadInput:
    (item,) = items
    assert isinstance(item, BadInput)
    return item


def test_every_format_gives_the_same_documents(tmp_path: Path):
    lines = json_lines(TEXTS)
    half = zstandard.compress(json_lines(TEXTS[:2])), zstandard.compress(json_lines(TEXTS[2:]))
    for path in (
        write(tmp_path / "a.jsonl", lines),
        write(tmp_path / "no-end.jsonl", lines.rstrip(b"\n")),
        write(tmp_path / "a.jsonl.gz", gzip.compress(lines)),
        write(tmp_path / "two-members.jsonl.gz", gzip.compress(lines[:7]) + gzip.compress(lines[7:])),
        write(tmp_path / "a.jsonl.zst", zstandard.compress(lines)),
        write(tmp_path / "two-frames.jsonl.zst", b"".join(half)),
        write(tmp_path / "mark.jsonl", b"\xef\xbb\xbf" + lines),
        write_table(tmp_path / "a.parquet", pa.array(TEXTS)),
        write_table(tmp_path / "large.parquet", pa.array(TEXTS, pa.large_string())),
        write_table(tmp_path / "dictionary.parquet", pa.array(TEXTS).dictionary_encode()),
        write_table(tmp_path / "view.parquet", pa.array(TEXTS, pa.string_view())),
        write_table(tmp_path / "binary.parquet", pa.array([text.encode() for text in TEXTS])),
        write_table(tmp_path / "upper.PARQUET", pa.array([text.encode() for text in TEXTS], pa.large_binary())),
        write(tmp_path / "upper.JSONL", lines),
        write(tmp_path / "b.ndjson", lines),
        write(tmp_path / "lines.json", lines),
        write(tmp_path / "array.json", json.dumps([json.loads(line) for line in lines.splitlines()]).encode()),
        write(
            tmp_path / "pretty.json",
            b"\n".join(json.dumps(json.loads(x), indent=2).encode() for x in lines.splitlines()),
        ),
        write(tmp_path / "a.jsonl.xz", lzma.compress(lines)),
        write(tmp_path / "a.jsonl.bz2", bz2.compress(lines)),
        write(tmp_path / "a.json.zstd", zstandard.compress(lines)),
        write(tmp_path / "a.jsonl.lz4", pa.compress(lines, "lz4", asbytes=True)),
        write(tmp_path / "really-parquet.jsonl", (tmp_path / "a.parquet").read_bytes()),
    ):
        assert texts_in(path) == TEXTS, path.name
    for text in TEXTS:
        for name in ("a.txt", "a.TXT", "notes.md"):
            assert texts_in(write(tmp_path / name, text.encode())) == [text]
        assert texts_in(write(tmp_path / "a.txt.gz", gzip.compress(text.encode()))) == [text]


def test_the_text_field_can_have_another_name(tmp_path: Path):
    assert texts_in(write(tmp_path / "a.jsonl", b'{"content": "c"}\n'), text_field="content") == ["c"]
    assert texts_in(write_table(tmp_path / "a.parquet", pa.array(["c"]), "content"), text_field="content") == ["c"]


def test_a_text_file_can_hold_many_documents(tmp_path: Path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\n  two\r\n\n \nthree\n\n\n")
    assert texts_in(path) == ["one\n  two\r\n\n \nthree\n\n\n"]
    assert texts_in(path, text_documents="lines") == ["one", "  two", "three"]
    assert texts_in(path, text_documents="paragraphs") == ["one\n  two", "three"]
    assert [item.origin for item in read(path, text_documents="paragraphs")] == [f"{path}, line 1", f"{path}, line 5"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "not UTF-8"),
        ("a.jsonl", b'{"text": 1}\n', "field 'text' is not a string"),
        ("a.jsonl", b'{"text": null}\n', "field 'text' is not a string"),
        ("a.jsonl", b'{"body": "x"}\n', "no field 'text'"),
        ("a.jsonl", b'"text"\n', "not a JSON object"),
        ("a.jsonl", b"text: x\n", "not valid JSON"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "not valid JSON"),
        ("a.jsonl", b'{"text": "cut off he', "the file ends in the middle of a line"),
        ("a.jsonl", b'[{"text": "x"},\n', "not valid JSON"),
        ("a.jsonl.gz", b"\x1f no gzip", "cannot be read to its end: truncated or damaged"),
        ("a.jsonl.zst", b"\xb5 no zstd", "cannot be read to its end: truncated or damaged"),
        ("a.txt.xz", b"\xfd7zX", "cannot be read to its end: truncated or damaged"),
        ("a.parquet", b"no parquet", "cannot be read to its end: truncated or damaged"),
    ],
)
def test_bad_inputs_are_reported_by_reason(name: str, content: bytes, reason: str, tmp_path: Path):
    item = only(read(write(tmp_path / name, content)))
    assert item.reason == reason
    assert str(tmp_path / name) in item.origin


def test_bad_lines_do_not_hide_the_good_ones_around_them(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": \xff}\n\n{"text": "b"}\n{"tex')
    places = [(type(item), item.origin.rsplit(" ", 1)[1]) for item in read(path)]
    assert places == [(Document, "1"), (BadInput, "2"), (Document, "3"), (Document, "4"), (BadInput, "5")]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_truncated_compressed_file_gives_what_it_has_and_says_so(suffix: str, compress, kept: float, tmp_path: Path):
    numbers = [str(n * 7919 % 65537) * 20 for n in range(20_000)]
    content = compress(json_lines(numbers))
    items = read(write(tmp_path / f"a.jsonl{suffix}", content[: int(kept * len(content))]))
    assert 0 < len(items) - 1 < len(numbers)
    assert [item.text for item in items[:-1]] == numbers[: len(items) - 1]
    assert items[-1].reason == "cannot be read to its end: truncated or damaged"
    assert items[-1].origin.endswith(f"after line {len(items) - 1}")


def test_a_parquet_file_is_judged_by_its_schema_and_each_row(tmp_path: Path):
    item = only(read(write_table(tmp_path / "a.parquet", pa.array(["x"]), "body")))
    assert (item.reason, item.detail) == ("no field 'text'", "its columns: number, body")
    item = only(read(write_table(tmp_path / "b.parquet", pa.array([1]))))
    assert (item.reason, item.detail) == ("field 'text' is not a string", "it is int64")
    spoiled = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"]).buffers())
    items = read(write_table(tmp_path / "c.parquet", spoiled))
    assert [getattr(item, "text", None) or item.reason for item in items] == ["a", "not UTF-8", "c"]
    items = read(write_table(tmp_path / "d.parquet", pa.array(["a", None])))
    assert isinstance(items[0], Document) and items[1].detail == "it is null"


def test_a_damaged_parquet_page_ends_the_file_with_its_row(tmp_path: Path):
    path = tmp_path / "a.parquet"
    texts = [hashlib.sha256(str(n).encode()).hexdigest() * 10 for n in range(600)]
    pyarrow.parquet.write_table(pa.table({"text": texts}), path, row_group_size=300, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half + 1000 : half + 1010] = bytes(10)
    *documents, last = read(write(path, bytes(content)))
    assert [item.text for item in documents] == texts[: len(documents)]
    assert 256 <= len(documents) < 600
    assert last.reason == "cannot be read to its end: truncated or damaged"
    assert last.origin.endswith(f"after row {len(documents)}")


def test_position_ends_at_the_file_s_size(tmp_path: Path):
    position = Position()
    path = write(tmp_path / "a.jsonl", json_lines(TEXTS))
    list(read_documents(path, SourceConfig(name="s"), position))
    assert position.file_bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b""),
        ("a.jsonl", b""),
        ("a.jsonl.gz", b""),
        ("a.txt.gz", gzip.compress(b"")),
        ("a.parquet", b""),
        ("a.json", b"[]"),
    ],
)
def test_an_empty_file_is_passed_over_with_a_remark(name: str, content: bytes, tmp_path: Path):
    path = write(tmp_path / name, content)
    assert read(path) == [Remark(str(path), EMPTY)]


def test_a_parquet_part_without_rows_is_passed_over(tmp_path: Path):
    path = write_table(tmp_path / "a.parquet", pa.array([], pa.string()))
    assert read(path) == [Remark(str(path), EMPTY)]


def test_what_is_no_file_is_not_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "a.txt")  # opening it would wait for a writer
    assert only(read(tmp_path / "a.txt")).reason == "not a file"
    (tmp_path / "b.txt").symlink_to("/dev/zero")
    assert only(read(tmp_path / "b.txt")).reason == "not a file"
    assert only(read(tmp_path / "vanished.jsonl")).reason == "cannot be opened"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json.gz", "a.parquet"])
def test_a_pointer_of_git_lfs_is_not_taken_for_the_file(name: str, tmp_path: Path):
    (*_, item) = read(write(tmp_path / name, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"))
    assert item.reason == (
        "a Git LFS pointer instead of the file"
        if name != "a.parquet"
        else "cannot be read to its end: truncated or damaged"
    )


@pytest.mark.parametrize("ends", [b"\r", b"\r\n", b"\n"])
def test_every_form_of_line_end(ends: bytes, tmp_path: Path):
    path = write(tmp_path / "a.txt", ends.join([b"one", b"two", b"", b"three", b""]))
    assert texts_in(path, text_documents="lines") == ["one", "two", "three"]
    assert texts_in(path, text_documents="paragraphs") == ["one\r\ntwo" if ends == b"\r\n" else "one\ntwo", "three"]
    assert texts_in(path) == [path.read_bytes().decode()]
    lines = write(tmp_path / "a.jsonl", json_lines(["a", "b"]).replace(b"\n", ends))
    assert texts_in(lines) == ["a", "b"]


@pytest.mark.parametrize(
    "encoding", ["latin-1", "cp1252", "UTF-16", "utf-16-be", "utf-32", "utf8", "utf-8-sig", "cp037"]
)
def test_a_source_can_have_another_encoding(encoding: str, tmp_path: Path):
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("café", "b\nb")]
    path = write(tmp_path / "a.txt", "café one\ntwo\n\nthree".encode(encoding))
    assert texts_in(path, encoding=encoding) == ["café one\ntwo\n\nthree"]
    assert texts_in(path, encoding=encoding, text_documents="lines") == ["café one", "two", "three"]
    assert texts_in(path, encoding=encoding, text_documents="paragraphs") == ["café one\ntwo", "three"]
    content = "\n".join(lines).encode(encoding)
    assert texts_in(write(tmp_path / "a.jsonl", content), encoding=encoding) == ["café", "b\nb"]
    assert texts_in(write(tmp_path / "a.jsonl.gz", gzip.compress(content)), encoding=encoding) == ["café", "b\nb"]
    array = f"[{','.join(lines)}]".encode(encoding)
    assert texts_in(write(tmp_path / "a.json", array), encoding=encoding) == ["café", "b\nb"]


def test_another_encoding_is_named_in_what_is_refused(tmp_path: Path):
    item = only(read(write(tmp_path / "a.txt", "text".encode("utf-16"))))
    assert item.reason == "not UTF-8" and "set encoding: utf-16" in item.detail
    item = only(read(write(tmp_path / "a.txt", b"caf\xe9")))
    assert item.reason == "not UTF-8" and "byte 3 is 0xe9: set encoding" in item.detail
    assert only(read(write(tmp_path / "a.txt", b"a\x81"), encoding="cp1252")).reason == "not cp1252"
    assert (
        only(read(write(tmp_path / "a.txt", b"a\0b"), encoding="utf-16", text_documents="lines")).reason == "not utf-16"
    )


def test_a_name_with_bytes_that_are_not_utf_8_can_be_printed(tmp_path: Path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n.jsonl"))
    write(path, b"{")
    assert str(only(read(path))) == f"{tmp_path}/caf\\udce9\\n.jsonl, line 1: the file ends in the middle of a line"
