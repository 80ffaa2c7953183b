"""Lines of a file: of bounded length, by what the file contains, with remarks on what its name does not say."""

import gzip
import lzma
import os
from pathlib import Path

import pytest
import zstandard

from dsllm.config.data import SourceConfig
from dsllm.prepare.document import BadInput, Document, Item, Remark
from dsllm.prepare.source_files import read_documents
from dsllm.prepare.text_lines import Position, open_text


def read(path: Path, content: bytes, **fields: object) -> list[Item]:
    path.write_bytes(content)
    return list(read_documents(path, SourceConfig(name="s", **fields), Position()))


def shown(items: list[Item]) -> list[str]:
    return [item.text if isinstance(item, Document) else str(item).rsplit("/", 1)[1] for item in items]


@pytest.mark.parametrize(
    ("name", "content", "really"),
    [
        ("plain.jsonl.gz", b'{"text": "x"}\n', "not compressed"),
        ("zstd.jsonl.gz", zstandard.compress(b'{"text": "x"}\n'), "compressed by zstd"),
        ("gzip.jsonl", gzip.compress(b'{"text": "x"}\n'), "compressed by gzip"),
        ("xz.json.zst", lzma.compress(b'[{"text": "x"}]'), "compressed by xz"),
    ],
)
def test_content_decides_where_the_name_is_wrong(name: str, content: bytes, really: str, tmp_path: Path):
    remark = f"{name}: compressed in another way than its name says (it is {really})"
    assert shown(read(tmp_path / name, content)) == [remark, "x"]


def test_bytes_behind_compressed_data_are_a_remark(tmp_path: Path):
    """The documents are all there: gzip itself warns only."""
    items = read(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "x"}\n') + b"\r\n")
    assert shown(items) == ["x", "a.jsonl.gz: bytes behind the compressed data, ignored (2 bytes)"]
    assert isinstance(items[1], Remark)
    assert shown(read(tmp_path / "a.txt.gz", gzip.compress(b"x") + b"\n")) == [
        *["x", "a.txt.gz: bytes behind the compressed data, ignored (1 bytes)"]
    ]


def test_a_line_that_is_too_long_is_skipped_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in ("text_lines", "source_files"):
        monkeypatch.setattr(f"dsllm.prepare.{module}.MOST_BYTES", 100)
    long = b"x" * 100
    lines = {"text_documents": "lines"}
    for length in (100, 101, 199, 200, 201, 1000):
        items = read(tmp_path / "a.txt", b"one\n" + b"x" * length + b"\ntwo\n", **lines)
        assert shown(items) == ["one", "a.txt, line 2: longer than 1,024 MiB", "two"]
    assert shown(read(tmp_path / "a.txt", long[:99] + b"\n" + long, **lines))[0] == "x" * 99
    assert shown(read(tmp_path / "a.jsonl", b'{"text": "a"}\n' + long)) == [
        "a",
        "a.jsonl, line 2: longer than 1,024 MiB",
    ]
    whole = read(tmp_path / "a.txt", long + b"x")
    assert shown(whole) == ["a.txt: longer than 1,024 MiB (set text_documents: paragraphs or lines for this source)"]
    paragraphs = read(tmp_path / "a.txt", b"one\n\n" + (b"x" * 60 + b"\n") * 3 + b"\ntwo", text_documents="paragraphs")
    hint = "a.txt, line 3: longer than 1,024 MiB (set text_documents: lines for this source)"
    assert shown(paragraphs) == ["one", hint, "two"]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"a\rb\rc", ["a", "b", "c"]),
        (b"a\rb\nc\r\nd", ["a\rb", "c", "d"]),  # a CR inside a line of a file with LF stays
        (b"a\r\n", ["a"]),
        (b"a\r", ["a"]),
        (b"\0a\n\0\n", ["\0a", "\0"]),
    ],
)
def test_lone_returns_end_lines_only_where_nothing_else_does(content: bytes, lines: list[str], tmp_path: Path):
    for name, written in (("a.txt", content), ("a.txt.gz", gzip.compress(content))):
        assert shown(read(tmp_path / name, written, text_documents="lines")) == lines


def test_a_damaged_compressed_text_is_reported_in_every_form_of_documents(tmp_path: Path):
    content = gzip.compress(os.urandom(50_000).hex().encode() + b"\n")[:-20]
    for unit in ("file", "lines", "paragraphs"):
        items = read(tmp_path / "a.txt.gz", content, text_documents=unit)
        assert isinstance(items[-1], BadInput) and items[-1].reason == "cannot be read to its end: truncated or damaged"


def test_position_follows_the_file_on_the_disk(tmp_path: Path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n' * 100_000))
    position = Position()
    with open_text(path, "utf-8") as (file, remarks):
        assert remarks == [] and not isinstance(file, BadInput)
        assert sum(1 for _ in file.lines(position)) == 100_000
    assert position.file_bytes == path.stat().st_size
