"""A DeepSpeed JSON against the table: every key by itself."""

import math
from collections.abc import Mapping
from typing import Any

import pytest

from dsllm.engine.settings.check import clashes, read_values
from dsllm.engine.settings.key import Key, nested
from dsllm.engine.settings.table import BLOCKS, TABLE

BAD = [True, False, 0, -1, 1.5, math.nan, math.inf, "x", "", [], [1], {"x": 1}]
OWNERS = {owner: [key for key in TABLE.values() if key.owner == owner] for owner in ("run", "json", "refused")}


def problems_of(given: Mapping[str, Any]) -> list[str]:
    return read_values(given)[1]


@pytest.mark.parametrize("key", TABLE.values(), ids=lambda key: key.path)
def test_null_and_auto_leave_every_key_to_dsllm(key: Key):
    for value in (None, "auto"):
        assert read_values(nested({key.path: value})) == ({}, [])


@pytest.mark.parametrize("key", OWNERS["json"], ids=lambda key: key.path)
def test_a_value_is_handed_on_or_named_with_what_it_must_be(key: Key):
    refused = 0
    for value in BAD:
        values, problems = read_values(nested({key.path: value}))
        refused += len(problems)
        assert len(problems) <= 1
        if problems:
            assert problems[0].startswith(f"deepspeed JSON: {key.path}") and values.get(key.path) is None
            assert f"but it is {value!r}" in problems[0] or key.reason in problems[0] or "unknown key" in problems[0]
        else:
            assert value in values.values() or key.is_off(value)
    assert refused, "no value is wrong for this key"


@pytest.mark.parametrize("key", OWNERS["refused"], ids=lambda key: key.path)
def test_a_refused_key_is_named_with_the_reason_unless_it_is_off(key: Key):
    for value in (["on"], "on", {"enabled": True}):
        (problem,) = problems_of(nested({key.path: value}))
        assert problem == f"deepspeed JSON: {key.path}: {key.reason}"
    for value in key.off:
        assert read_values(nested({key.path: value})) == ({}, [])


@pytest.mark.parametrize(
    "path",
    [
        "tensorboard",
        "autotuning",
        "amp",
        "wandb",
        "elasticity",
        "curriculum_learning",
        "fp8",
        "zero_optimization.zenflow",
    ],
)
def test_a_disabled_object_is_accepted(path: str):
    """Configs written for Hugging Face's Trainer switch off in this way what they do not use."""
    assert read_values(nested({path: {"enabled": False, "output_path": "x"}})) == ({}, [])


@pytest.mark.parametrize("path", [path for path in BLOCKS if path])
def test_a_misspelled_key_is_unknown_in_every_object(path: str):
    name = next(key.name for key in TABLE.values() if key.block == path)
    (problem,) = problems_of(nested({f"{path}.{name}_": 1}))
    assert problem.startswith(f"deepspeed JSON: {path}.{name}_: unknown key")
    assert problem.endswith(f"; did you mean '{name}'?")


def test_it_is_said_where_deepspeed_would_ignore_a_key():
    assert "ignore it silently" in problems_of({"steps_per_prin": 1})[0]
    assert "ignore it silently" not in problems_of({"zero_optimization": {"stag": 1}})[0]


def test_numbers_get_the_tables_type():
    values, _ = read_values({"zero_optimization": {"stage": 2.0, "reduce_bucket_size": 5e7}})
    assert values == {"zero_optimization.stage": 2, "zero_optimization.reduce_bucket_size": 50_000_000}
    assert all(isinstance(value, int) for value in values.values())


@pytest.mark.parametrize("key", [key for key in OWNERS["run"] if key.path not in BLOCKS], ids=lambda key: key.path)
def test_what_the_run_decides_may_be_repeated_and_not_changed(key: Key):
    values, problems = read_values(nested({key.path: 7}))
    assert not problems
    assert not list(clashes(values, {key.path: 7})) and not list(clashes(values, {key.path: None}))
    assert list(clashes(values, {key.path: 8})) == [
        f"deepspeed JSON: {key.path} is 7, but the run says 8 ({key.decided_by})"
    ]
    (clash,) = clashes(values, {})
    assert clash.startswith(f"deepspeed JSON: {key.path} belongs to the run: set {key.decided_by}, and remove it here")
    assert clash.endswith(key.reason)


@pytest.mark.parametrize(
    "given, field",
    [
        ({"tensor_parallel": {"autotp_size": 2}}, "parallel.tensor"),
        ({"pipeline": {"stages": 2}}, "parallel.pipeline"),
        ({"sequence_parallel_size": 2}, "parallel.sequence"),
        ({"expert_parallel": {"enabled": True}}, "parallel.expert"),
    ],
)
def test_the_other_axes_belong_to_the_run(given: dict, field: str):
    values, problems = read_values(given)
    (clash,) = clashes(values, {})
    assert not problems and f"set {field}, and remove it here" in clash


def test_one_rank_per_sequence_and_no_tensor_parallelism_are_no_clash():
    assert read_values({"sequence_parallel_size": 1, "tensor_parallel": {}, "pipeline": {}}) == ({}, [])
