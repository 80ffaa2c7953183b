"""Every format gives the same documents, and each input that cannot be read is reported with its place."""

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from dsllm.config.data import SourceConfig
from dsllm.errors import DataError
from dsllm.prepare.document import BadInput, Document
from dsllm.prepare.source_files import Position, find_files, read_documents

TEXTS = ["one\ntwo", "é 你 😀", "  indented\r\n", "x" * 5000]


def read(path: Path, **fields: object) -> list[Document | BadInput]:
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


def only(items: list[Document | BadInput]) -> BadInput:
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
    ):
        assert texts_in(path) == TEXTS, path.name
    for text in TEXTS:
        assert texts_in(write(tmp_path / "a.txt", text.encode())) == [text]


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
        ("a.txt", b"", "empty file"),
        ("a.jsonl", b"", "empty file"),
        ("a.jsonl.gz", b"", "empty file"),
        ("a.jsonl.gz", gzip.compress(b""), "empty file"),
        ("a.parquet", b"", "empty file"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "not UTF-8"),
        ("a.jsonl", b'{"text": 1}\n', "field 'text' is not a string"),
        ("a.jsonl", b'{"text": null}\n', "field 'text' is not a string"),
        ("a.jsonl", b'{"body": "x"}\n', "no field 'text'"),
        ("a.jsonl", b'"text"\n', "not a JSON object"),
        ("a.jsonl", b"text: x\n", "not valid JSON"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "not valid JSON"),
        ("a.jsonl", b'{"text": "cut off he', "the file ends in the middle of a line"),
        ("a.jsonl.gz", b"no gzip", "cannot be read to its end: truncated or damaged"),
        ("a.jsonl.zst", b"no zstd", "cannot be read to its end: truncated or damaged"),
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


def names(source_paths: list[Path | str]) -> list[str]:
    return [path.name for path in find_files(SourceConfig(name="s", paths=tuple(map(str, source_paths))))[0]]


def test_folders_are_searched_in_order_and_others_files_counted(tmp_path: Path):
    for name in ("b/2.txt", "b/1.jsonl", "a.txt", ".git/x.txt", ".hidden.txt", "b/notes.md", "c/data.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found, ignored = find_files(SourceConfig(name="s", paths=(str(tmp_path),)))
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.txt", "b/1.jsonl", "b/2.txt"]
    assert dict(ignored) == {".md": 1, ".csv": 1}


def test_a_folder_is_read_once_whatever_links_lead_to_it(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "b.txt").write_text("x")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a").symlink_to(tmp_path / "b")
    assert names([tmp_path]) == ["b.txt"]


def test_an_error_counts_the_other_files_of_its_own_path_only(tmp_path: Path):
    for name in ("first/a.txt", "first/b.md", "second/c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"second has no file .*, but 1 \.csv: convert"):
        names([tmp_path / "first", tmp_path / "second"])


def test_globs_match_files_and_each_file_counts_once(tmp_path: Path):
    for name in ("b.txt", "a.txt", "c[1].txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "d.md").write_text("x")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "e.txt").write_text("x")
    assert names([tmp_path / "[ab].txt"]) == ["a.txt", "b.txt"]
    assert names([tmp_path / "c[1].txt"]) == ["c[1].txt"]
    assert names([tmp_path / "a.txt", tmp_path / "*.txt"]) == ["a.txt", "b.txt", "c[1].txt"]
    assert names([tmp_path / "**"]) == ["a.txt", "b.txt", "c[1].txt", "e.txt"]
    assert names([tmp_path / "?"]) == ["e.txt"]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("none.txt", "no such file or folder"),
        ("none/*.txt", "matches nothing"),
        ("empty", "has no file of a type that dsllm reads"),
        ("table.csv", ".parquet), but 1 .csv: convert them"),
    ],
)
def test_paths_that_give_nothing_are_errors(path: str, problem: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("x")
    (tmp_path / "table.csv").write_text("x")
    with pytest.raises(DataError) as caught:
        names([tmp_path / path])
    assert (
        problem in str(caught.value) and "source 's'" in str(caught.value) and path.split("/")[0] in str(caught.value)
    )
