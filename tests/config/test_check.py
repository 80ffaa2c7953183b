"""Every value that cannot work is found, and its problem names a field that exists."""

import dataclasses
from functools import reduce
from typing import Any

import pytest

from dsllm.config.check import problems_in
from dsllm.config.data import DataConfig, SourceConfig
from dsllm.config.model import ModelConfig, RopeScaling
from dsllm.config.run import RunConfig, RunSection

GOOD = RunConfig(
    run=RunSection(name="good"),
    data=DataConfig(sources=(SourceConfig(name="a", paths=("a.txt",), weight=1.0),)),
    model=ModelConfig(
        rope_scaling=RopeScaling(
            factor=4.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context_length=32
        )
    ),
)


def paths(value: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all fields below a value, as names and indices."""
    if isinstance(value, tuple):
        return [path for i, item in enumerate(value) for path in paths(item, (*prefix, str(i)))]
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
        return [path for name in fields for path in paths(getattr(value, name), (*prefix, name))]
    return [prefix]


def child(value: Any, name: str) -> Any:
    return value[int(name)] if isinstance(value, tuple) else getattr(value, name)


def replaced(value: Any, path: tuple[str, ...], new: Any) -> Any:
    """A copy of a tree with another value at a path."""
    if not path:
        return new
    inner = replaced(child(value, path[0]), path[1:], new)
    if isinstance(value, tuple):
        return tuple(inner if i == int(path[0]) else item for i, item in enumerate(value))
    return dataclasses.replace(value, **{path[0]: inner})


FLOATS = [path for path in paths(GOOD) if isinstance(reduce(child, path, GOOD), float)]


def test_the_defaults_can_work():
    assert problems_in(GOOD) == []


@pytest.mark.parametrize("path", FLOATS, ids=".".join)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_may_be_nan_or_infinite(path: tuple[str, ...], value: float):
    assert (".".join(path), f"must be a finite number, but it is {value}") in problems_in(replaced(GOOD, path, value))


NUMBERS = [path for path in paths(GOOD) if type(reduce(child, path, GOOD)) in (int, float) and path[-1] != "seed"]


@pytest.mark.parametrize("path", NUMBERS, ids=".".join)
def test_a_negative_number_is_refused_by_the_name_of_a_field(path: tuple[str, ...]):
    """No number of a run but the seed may be negative. The field may be another one: a size of -7 fits no other size."""
    found = problems_in(replaced(GOOD, path, type(reduce(child, path, GOOD))(-7)))
    assert found
    for field, _ in found:
        reduce(child, field.split("."), GOOD)
