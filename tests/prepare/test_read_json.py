"""JSON is read as Python's json reads it, in lines, arrays and objects over several lines; the rest is reported by place.

The fuzz test tries 3 forms with 200 damages each, its slow variant with 5,000 each.
"""

import json
import random
from pathlib import Path

import pytest

from dsllm.config.data import SourceConfig
from dsllm.prepare.document import BadInput, Document, Item
from dsllm.prepare.read_json import document_in
from dsllm.prepare.source_files import read_documents
from dsllm.prepare.text_lines import Position

RECORDS = [{"id": n, "text": f'é {n} "quoted" \\ 😀' * (n % 7), "list": [1.5e3, None, {"a": [[]]}]} for n in range(40)]


def read(path: Path, content: bytes | str, text_field: str = "text") -> list[Item]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_documents(path, SourceConfig(name="s", text_field=text_field), Position()))


def texts(items: list[Item]) -> list[str]:
    assert all(isinstance(item, Document) for item in items), items
    return [item.text for item in items]


def only(items: list[Item]) -> BadInput:
    (item,) = items
    assert isinstance(item, BadInput)
    return item


FORMS = {
    "lines": "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS) + "\n",
    "array": json.dumps(RECORDS, ensure_ascii=False),
    "pretty": "\n".join(json.dumps(record, indent=1, ensure_ascii=False) for record in RECORDS),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("characters", [1, 7, 2**18])
def test_every_form_gives_the_same_documents(
    form: str, characters: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dsllm.prepare.read_json._READ_CHARACTERS", characters)
    assert texts(read(tmp_path / "a.json", FORMS[form])) == [record["text"] for record in RECORDS]
    beginning = "\ufeff" if form == "lines" else "\ufeff \r\n"
    assert texts(read(tmp_path / "a.json", beginning + FORMS[form])) == [record["text"] for record in RECORDS]


def test_one_object_with_all_keys_in_lines_of_their_own(tmp_path: Path):
    assert texts(read(tmp_path / "a.json", '{\n  "text": "x"\n}\n')) == ["x"]
    assert texts(read(tmp_path / "a.json", '{\r"text": "x"\r}\r')) == ["x"]
    assert texts(read(tmp_path / "a.json", '{"text": "x"}')) == ["x"]
    assert "Extra data" in str(only(read(tmp_path / "a.json", '{"text": "x"}{"text": "y"}')))
    assert texts(read(tmp_path / "a.json", ' \n [ {"text": "x"} , {"text": "y"}\n]\n ')) == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "num_read", "detail"),
    [
        ('[{"text": "x"}, {"text": "y"}', 2, "the file ends inside its array; what follows is not read"),
        ('[{"text": "x"} {"text": "y"}]', 1, "'{' instead of a comma or ] after an element; what follows is not read"),
        ('[{"text": "x"}, {"text": "y]', 1, "Unterminated string"),
        ('[{"text": "x"}, ]', 1, "Expecting value"),
        ('[{"text": "x"}] {"text": "y"}', 1, "'{' follows the array"),
        ('[{"text": "x"}, ' + "[" * 100_000, 1, "recursion"),
        ('[{"text": "x"}, {"a": ' + "9" * 5000 + "}]", 1, "digits"),
        ("[", 0, "the file ends inside its array"),
    ],
)
def test_an_array_is_read_up_to_what_is_not_json(content: str, num_read: int, detail: str, tmp_path: Path):
    *documents, last = read(tmp_path / "a.json", content)
    assert texts(documents) == ["x", "y"][:num_read]
    assert isinstance(last, BadInput) and last.reason == "not valid JSON" and detail in last.detail
    assert last.origin.endswith(f"a.json, after element {num_read}")


def test_much_space_is_no_content(tmp_path: Path):
    (remark,) = read(tmp_path / "a.json", "[" + " " * 20_000_000 + "]")
    assert str(remark).endswith("a.json: empty file, passed over")


def test_a_mistake_early_in_a_large_array_is_found_without_reading_it_all(tmp_path: Path):
    (item,) = read(tmp_path / "a.json", "[{'text': 1}, " + " " * 10_000_000 + "]")
    assert "Expecting property name" in str(item)


def test_elements_that_are_no_documents_do_not_hide_the_others(tmp_path: Path):
    items = read(tmp_path / "a.json", '[1, "a", {"text": null}, {"body": "x"}, {"text": "y"}, [], 12345]')
    assert [item.reason for item in items if isinstance(item, BadInput)] == [
        *["not a JSON object"] * 2,
        "field 'text' is not a string",
        "no field 'text'",
        *["not a JSON object"] * 2,
    ]
    assert [item.text for item in items if isinstance(item, Document)] == ["y"]
    assert items[3].origin.endswith("a.json, element 4")


def test_an_array_that_is_not_in_the_encoding_ends_there(tmp_path: Path):
    *documents, last = read(tmp_path / "a.json", b'[{"text": "x"},' + b" " * 300_000 + b'{"text": "caf\xe9"}]')
    assert texts(documents) == ["x"] and last.reason == "not utf-8" and "0xe9" in last.detail


def test_an_array_in_lines_gets_a_hint(tmp_path: Path):
    item = only(read(tmp_path / "a.jsonl", '[{"text": "x"},\n'))
    assert item.detail.endswith("an array is read from a file named .json, or write one object per line")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"text": "x", "n": NaN, "m": 1e999}', "x"),
        (b'{"text": "x", "n": 1234567890123456789012345}', "x"),
        (b'{"text": "first", "text": "x"}', "x"),  # the last one counts, as in Python
        ('{"text": "x\u2028y\x85"}'.encode(), "x\u2028y\x85"),
        (b'{"text": "\\ud83d\\ude00"}', "😀"),
        (b'{"text": "x"}\r', "x"),
        (b'\xef\xbb\xbf{"text": "x"}', "x"),
        (b'{"text": "\\u0000"}', "\0"),
        (b'{"text": "' + b"x" * 2_500_000 + b'"}', "x" * 2_500_000),
        (b'{"n": ' + b"9" * 5000 + b', "text": "x"}', "not valid JSON"),
        (b'{"text": "x"} {"text": "y"}', "not valid JSON"),
        (b'{"text": "x",}', "not valid JSON"),
        (b'{"text": "x"},', "not valid JSON"),
        (b"{'text': 'x'}", "not valid JSON"),
        (b'{"text": "a\tb"}', "not valid JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": NaN}', "field 'text' is not a string"),
    ],
)
def test_unusual_lines(line: bytes, found: str, tmp_path: Path):
    for name in ("a.jsonl", "a.json"):
        (item,) = read(tmp_path / name, line + b"\n")
        assert (item.text if isinstance(item, Document) else item.reason) == found


@pytest.mark.parametrize(
    ("record", "field", "found"),
    [
        ({"doc": {"text": "x"}}, "doc.text", "x"),
        ({"a": {"b": {"c": "x"}}}, "a.b.c", "x"),
        ({"doc.text": "flat", "doc": {"text": "x"}}, "doc.text", "flat"),
        ({"doc": {"body": "x"}}, "doc.text", "no field 'doc.text' ('doc': fields: body)"),
        ({"doc": [{"text": "x"}]}, "doc.text", "no field 'doc.text' ('doc': list)"),
        ({"doc": "x"}, "doc.text", "no field 'doc.text' ('doc': str)"),
        ({"doc": {"text": None}}, "doc.text", "field 'doc.text' is not a string (it is null)"),
        ({}, "doc.text", "no field 'doc.text' (its fields: none)"),
    ],
)
def test_a_field_inside_objects_is_named_with_dots(record: dict, field: str, found: str):
    item = document_in(record, field, "here")
    assert (item.text if isinstance(item, Document) else str(item).removeprefix("here: ")) == found


def test_names_of_fields_can_be_printed(tmp_path: Path):
    text = str(only(read(tmp_path / "a.jsonl", '{"\\ud83d\\u001b[31m": 1}\n')))
    assert text.endswith("(its fields: \\ud83d\\x1b[31m)")
    assert len(str(only(read(tmp_path / "a.jsonl", json.dumps({"k" * 100_000: 1}))))) < 1000


def values_in(content: str, form: str) -> list:
    """What Python's json reads from a whole file; raises ValueError if any of it is not JSON."""
    if form == "array":
        return json.loads(content)
    if form == "lines":
        return [json.loads(line) for line in content.split("\n") if line.strip()]
    values, at, decoder = [], 0, json.JSONDecoder()
    while rest := content[at:].lstrip(" \t\r\n"):
        value, at = decoder.raw_decode(content, len(content) - len(rest))
        values.append(value)
    return values


def check_damage(form: str, num_inputs: int, path: Path) -> None:
    """The documents are those that Python's json reads, or an input is bad; nothing is raised."""
    whole, rng = FORMS[form].encode(), random.Random(form)
    for _ in range(num_inputs):
        place, content = rng.randrange(5, len(whole)), bytearray(whole)
        match rng.randrange(4):
            case 0:
                del content[place:]
            case 1:
                content[place] ^= 1 << rng.randrange(8)
            case 2:
                content[place:place] = rng.randbytes(rng.randrange(1, 9))
            case _:
                del content[place : place + rng.randrange(1, 60)]
        items = read(path, bytes(content))
        try:
            values = values_in(content.decode(), form)
        except ValueError:
            assert any(isinstance(item, BadInput) for item in items), bytes(content)
            continue
        expected = [value.get("text") if isinstance(value, dict) else None for value in values]
        found = [item.text if isinstance(item, Document) else None for item in items]
        assert [text for text in found if text] == [text for text in expected if text]


@pytest.mark.parametrize("form", FORMS)
def test_damaged_json_is_reported_and_never_raises(form: str, tmp_path: Path):
    check_damage(form, 200, tmp_path / "a.json")


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_much_damaged_json_is_reported_and_never_raises(form: str, tmp_path: Path):
    check_damage(form, 5000, tmp_path / "a.json")
