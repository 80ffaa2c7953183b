"""One key of the DeepSpeed JSON: its types, what switches it off, and which rows of the parity table stand for a value."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from dsllm.engine.settings.key import (
    Covered,
    Factor,
    Key,
    Positive,
    Stage,
    Switch,
    Whole,
    block,
    nested,
    refused,
    value_at,
)


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (Switch, [True, False], [0, 1, "true", None]),
        (Whole, [0, 5, 5e7, 2**63], [True, -1, 1.5, "5", math.nan, math.inf, None]),
        (Positive, [1, 1e3], [0, False]),
        (Factor, [1, 0.5, 2.0], [0, -1.0, True, math.nan, math.inf, "2"]),
        (Stage, [0, 1.0, 3], [True, 4, -1, "1", 1.5]),
    ],
)
def test_types_take_what_json_writes_and_nothing_else(kind: Any, good: list, bad: list):
    adapter = Key("key", "json", kind).adapter
    assert [adapter.validate_python(value) for value in good] == good
    for value in bad:
        with pytest.raises(ValidationError):
            adapter.validate_python(value)


def test_a_whole_number_becomes_an_int():
    """DeepSpeed hands some numbers to C++, which takes no float."""
    assert isinstance(Key("key", "json", Whole).adapter.validate_python(5e7), int)


def test_off_is_one_of_the_off_values_or_a_disabled_object():
    key = refused("key", "reason")
    assert all(key.is_off(value) for value in (False, {}, {"enabled": False, "path": "x"}))
    assert not any(key.is_off(value) for value in (True, 0, "off", {"enabled": True}, {"path": "x"}, []))
    assert not refused("key", "reason", off=()).is_off({})
    assert refused("key", "reason", off=(True,)).is_off(True) and not refused("key", "reason", off=(True,)).is_off(1)


def test_a_block_gives_its_keys_a_path_and_its_stages():
    outer, one, two = block(Key("outer", "json", stages=(2, 3)), Key("one", "json"), Key("two", "json", stages=(0, 3)))
    assert (outer.path, one.path, two.path) == ("outer", "outer.one", "outer.two")
    assert (one.stages, two.stages) == ((2, 3), (3,))
    assert (two.block, two.name) == ("outer", "two") and outer.block == ""


def test_values_of_the_table_that_stand_for_a_value():
    elements = Covered(values=(0, 10, 1000), others=(10, 1000))
    assert elements.rows_for(0) == (0,)
    assert elements.rows_for(5) == elements.rows_for(10) == (10, 1000)
    device = Covered(values=("none", "cpu"), outside={"nvme": "not run here"})
    assert device.rows_for("cpu") == ("cpu",) and device.rows_for("nvme") == ()


def test_nesting_and_looking_up_are_inverse():
    values = {"a": 1, "b.c": False, "b.d.e": "x"}
    made = nested(values)
    assert made == {"a": 1, "b": {"c": False, "d": {"e": "x"}}}
    assert {path: value_at(path, made) for path in values} == values
    assert value_at("b.absent", made) is None and value_at("a.b", made) is None
