"""YAML 1.2 with the line of every key, merge keys and aliases, and bounds on what a file makes the reader do."""

import time
from pathlib import Path

import pytest

from dsllm.config.yaml_file import MOST_BYTES, parse_value, read_yaml
from dsllm.errors import ConfigError

ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(f'*{a}' for _ in range(9))}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{','.join(f'*{a}' for _ in range(9))}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def file_of(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_yaml(file_of(folder, text))
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ALIASES, ":6: is not valid YAML: more than 100,000 values, each alias counted as often as it is used"),
        (MERGES, ":6: is not valid YAML: more than 100,000 values"),
        ("data: &a [*a]", ":1: is not valid YAML: *a is inside what it stands for"),
        ("data: &a {b: {c: *a}}", ":1: is not valid YAML: *a is inside what it stands for"),
        ("data: " + "[" * 3000 + "]" * 3000, ":1: is not valid YAML: more than 50 lists and mappings inside each other"),
        ("{a: " * 3000, ":1: is not valid YAML: more than 50"),
        ("- " * 3000, ":1: is not valid YAML: more than 50"),
        ("a: 1\nb: " + "9" * 5000, ":2: is not valid YAML: a number of 5,000 characters"),
        ("a: 0x" + "f" * 5000, "a number of 5,002 characters"),
        ("a: !!timestamp x", "type timestamp is not read"),
        ("a: !!python/object/apply:os.system [ls]", "type python/object/apply:os.system is not read"),
        ("a: !!int x", "'x' is not a whole number"),
        ("a: !!bool maybe", "'maybe' is not true or false"),
        ("a: !!float x", "'x' is not a number"),
        ("? [a]\n: b", "found unhashable key"),
        ("a: [1", ":1: is not valid YAML"),
        ("a: {<<: 3}", "for merging, but found scalar"),
        ("<<: {a: 1}\n<<: {b: 2}", "<<: given twice, on lines 1 and 2"),
        ("a: 1\n#" + "x" * MOST_BYTES, "at most"),
        ("a: \x00", "is not valid YAML"),
    ],
    ids=lambda value: value[:24] if value.isprintable() else "text",
)  # fmt: skip
def test_what_would_not_end_or_is_no_yaml_is_one_line_in_a_second(tmp_path, text, says):
    began = time.process_time()
    message = refusal(tmp_path, text)
    assert time.process_time() - began < 1.5
    assert says in message and message.startswith(str(tmp_path / "run.yaml")) and "\n" not in message


def test_an_alias_is_a_value_of_its_own(tmp_path):
    value, lines = read_yaml(file_of(tmp_path, "a: &a {x: 1, y: [2]}\nb: *a\n"))
    assert value == {"a": {"x": 1, "y": [2]}, "b": {"x": 1, "y": [2]}} and lines["b", "x"] == 1
    value["a"]["y"].append(3)
    assert value["b"]["y"] == [2]


def test_merge_keys_take_over_what_is_not_given(tmp_path):
    text = "a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc:\n  <<: [*a, *b]\n  x: 5\n"
    value, lines = read_yaml(file_of(tmp_path, text))
    assert value["c"] == {"x": 5, "y": 2, "z": 4}
    assert [lines["c", key] for key in "xyz"] == [5, 1, 2]


def test_a_fifo_or_a_folder_is_not_read(tmp_path):
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(ConfigError, match="not a file"):
            read_yaml(path)


@pytest.mark.parametrize("text", ["a: 1", "[1, 2]", "2e6", "", "x", "'<<'", "{<<: {a: 1}, b: 2}"])
def test_an_override_is_read_as_the_file_is(tmp_path, text):
    assert parse_value(text) == read_yaml(file_of(tmp_path, f"key: {text if text != 'a: 1' else '{a: 1}'}"))[0]["key"]
