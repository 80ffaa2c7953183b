"""Every value that cannot work is found, and its problem names a field that exists."""

import dataclasses
from functools import reduce
from typing import Any

import pytest

from dsllm.config.check import directory_problems, problems_in
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


MOST = {"num_layers": 10_000, "hidden_size": 2**18, "vocab_size": 2**24, "num_heads": 2**14, "head_size": 2**16}


@pytest.mark.parametrize("path", [p for p in NUMBERS if p != ("run", "seed")], ids=".".join)
@pytest.mark.parametrize("value", [10**30, 10**400], ids=["1e30", "1e400"])
def test_no_whole_number_may_be_absurd(path: tuple[str, ...], value: int):
    found = problems_in(replaced(GOOD, path, value))
    assert any(field == ".".join(path) and "must be at most 1e+18" in text for field, text in found)
    assert all(len(text) < 400 for _, text in found)


@pytest.mark.parametrize("name", MOST)
def test_a_size_of_a_model_that_nobody_builds_is_refused_at_once(name: str):
    for value in (MOST[name] + 1, 10**12):
        (problem,) = problems_in(replaced(GOOD, ("model", name), value))
        assert problem == (f"model.{name}", f"must be at most {MOST[name]:,}, but it is {value:,}")


@pytest.mark.parametrize(
    ("run", "data", "how"),
    [
        ("out", "out", "is also data.directory"),
        ("out", "./x/../out", "is also data.directory"),
        ("out/run", "out", "is inside data.directory"),
        ("out", "out/data", "contains data.directory"),
        ("link", "out", "is also data.directory"),
    ],
)
def test_a_run_and_its_data_need_folders_of_their_own(run, data, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("out")
    config = replaced(replaced(GOOD, ("run", "directory"), run), ("data", "directory"), data)
    ((field, text),) = directory_problems(config)
    assert field == "run.directory" and text.startswith(f"{run} {how}")
    assert directory_problems(replaced(config, ("data", "directory"), "output")) == []
