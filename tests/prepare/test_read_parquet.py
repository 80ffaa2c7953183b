"""A Parquet column gives its texts whatever its type; what is not text is refused in words.

The fuzz test tries 150 damages of two files, its slow variant 3,000.
"""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from dsllm.config.data import SourceConfig
from dsllm.prepare.document import BadInput, Document, Item
from dsllm.prepare.source_files import read_documents
from dsllm.prepare.text_lines import Position

TEXTS = ["one\ntwo", "é 你 😀", "", "x" * 5000]
BYTES = [text.encode() for text in TEXTS]


def read(path: Path, text_field: str = "text") -> list[Item]:
    return list(read_documents(path, SourceConfig(name="s", text_field=text_field), Position()))


def write(path: Path, table: pa.Table, **options: object) -> Path:
    pyarrow.parquet.write_table(table, path, **options)
    return path


def texts(items: list[Item]) -> list[str]:
    assert all(isinstance(item, Document) for item in items), items
    return [item.text for item in items]


COLUMNS = {
    "string": pa.array(TEXTS),
    "large_string": pa.array(TEXTS, pa.large_string()),
    "string_view": pa.array(TEXTS, pa.string_view()),
    "binary": pa.array(BYTES),
    "large_binary": pa.array(BYTES, pa.large_binary()),
    "binary_view": pa.array(BYTES, pa.binary_view()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "dictionary of binary": pa.array(BYTES).dictionary_encode(),
    "dictionary of large strings": pa.array(TEXTS, pa.large_string()).dictionary_encode(),
    "extension": pa.array(TEXTS, pa.json_()),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_every_type_of_text_is_read(kind: str, tmp_path: Path):
    column = COLUMNS[kind]
    assert texts(read(write(tmp_path / "a.parquet", pa.table({"text": column})))) == TEXTS
    inside = pa.table({"doc": pa.StructArray.from_arrays([column], ["text"])})
    assert texts(read(write(tmp_path / "b.parquet", inside), "doc.text")) == TEXTS


def test_text_of_a_fixed_size_is_read(tmp_path: Path):
    assert texts(read(write(tmp_path / "a.parquet", pa.table({"text": pa.array([b"ab", b"cd"], pa.binary(2))})))) == [
        "ab",
        "cd",
    ]


def test_nulls_are_reported_by_row_also_where_the_struct_is_null(tmp_path: Path):
    table = pa.table({"doc": [{"text": "x", "n": 1}, None, {"text": None, "n": 2}, {"text": "y", "n": 3}]})
    items = read(write(tmp_path / "a.parquet", table), "doc.text")
    assert [item.text if isinstance(item, Document) else item.origin.rsplit(", ")[1] for item in items] == [
        *["x", "row 2", "row 3", "y"]
    ]


@pytest.mark.parametrize("flat_first", [True, False])
def test_a_column_with_a_dot_in_its_name_comes_before_a_field_in_a_struct(flat_first: bool, tmp_path: Path):
    columns = {"doc.text": ["flat"], "doc": [{"text": "inside"}]}
    table = pa.table(columns if flat_first else dict(reversed(columns.items())))
    assert texts(read(write(tmp_path / "a.parquet", table), "doc.text")) == ["flat"]


@pytest.mark.parametrize(
    ("column", "field", "problem"),
    [
        ([1], "text", "field 'text' is not a string (it is int64)"),
        ([["x"]], "text", "field 'text' is not a string (it is list<element: string>)"),
        ([{"a": "x"}], "text", "field 'text' is not a string (it is struct<a: string>)"),
        ([{"a": "x"}], "text.b", "no field 'text.b' (the columns of 'text': a)"),
        (
            [[{"a": "x"}]],
            "text.a",
            "no field 'text.a' (the columns of 'text': none, it is list<element: struct<a: string>>)",
        ),
        (["x"], "body", "no field 'body' (its columns: text)"),
        ([b"\xff"], "text", "not UTF-8 (byte 0 is 0xff"),
    ],
)
def test_what_is_not_text_is_refused_in_words(column: list, field: str, problem: str, tmp_path: Path):
    (item,) = read(write(tmp_path / "a.parquet", pa.table({"text": column})), field)
    assert isinstance(item, BadInput) and problem in str(item)


def test_two_columns_of_one_name_are_refused(tmp_path: Path):
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    twice = write(tmp_path / "a.parquet", pa.Table.from_arrays(columns, names=["text", "text", "other"]))
    (item,) = read(twice)
    assert str(item) == f"{twice}: 2 columns are named 'text'"
    others = write(tmp_path / "b.parquet", pa.Table.from_arrays(columns, names=["text", "other", "other"]))
    assert texts(read(others)) == ["a"]


def test_many_rows_come_in_order(tmp_path: Path):
    many = [str(n) for n in range(2000)]
    assert texts(read(write(tmp_path / "a.parquet", pa.table({"text": many}), row_group_size=300))) == many


def check_damage(num_inputs: int, folder: Path) -> None:
    """Damage gives the same documents as before it, or a bad input; nothing else is raised.

    The file has checksums of its pages, so that a text is right or reported.
    """
    numbers = [f"{n} " * (n % 9 + 1) for n in range(300)]
    plain = write(folder / "whole.parquet", pa.table({"text": numbers}), row_group_size=100, write_page_checksum=True)
    inside = pa.table({"doc": [{"text": text} for text in numbers], "text": numbers})
    whole = [plain.read_bytes(), write(plain, inside, compression="none", write_page_checksum=True).read_bytes()]
    rng, path = random.Random(11), folder / "a.parquet"
    for i in range(num_inputs):
        content = bytearray(whole[i % 2])
        place = rng.randrange(len(content)) if rng.random() < 0.5 else rng.randrange(len(content) - 400, len(content))
        match rng.randrange(4):
            case 0:
                del content[place:]
            case 1:
                content[place] ^= 1 << rng.randrange(8)
            case 2:
                content[place : place + 8] = rng.randbytes(8)
            case _:
                del content[place : place + rng.randrange(1, 60)]
        path.write_bytes(content)
        for field in ("text", "doc.text"):
            items = read(path, field)
            found = [item.text for item in items if isinstance(item, Document)]
            assert found == numbers[: len(found)]
            assert len(found) == len(numbers) or isinstance(items[-1], BadInput)


def test_damaged_files_are_reported_and_never_raise(tmp_path: Path):
    check_damage(150, tmp_path)


@pytest.mark.slow
def test_much_damaged_files_are_reported_and_never_raise(tmp_path: Path):
    check_damage(3000, tmp_path)
