"""The table of DeepSpeed's keys, compared with what the installed DeepSpeed really reads."""

import copy
import dataclasses
import typing
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from dsllm.config.parallel import ParallelConfig
from dsllm.config.run import RunConfig
from dsllm.engine.settings.key import Key
from dsllm.engine.settings.table import (
    BLOCKS,
    JSON,
    OFFLOAD_OPTIMIZER,
    OFFLOAD_PARAM,
    REFUSED,
    RUN,
    TABLE,
    ZERO,
    keys_in,
)

LEAVES = [key for key in TABLE.values() if key.path not in BLOCKS]
OF_JSON = [key for key in LEAVES if key.owner == "json"]


class Recorded(dict):
    """A config that notes every key that is looked up in it."""

    def __init__(self, values: dict, seen: set[str]):
        super().__init__(values)
        self.seen = seen

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self  # `key in config.keys()` is a look-up, too

    def __copy__(self) -> "Recorded":
        return Recorded(self, self.seen)


def looked_up(block: str = "") -> set[str]:
    """Keys that DeepSpeed looks up in its config, or in an object of it."""
    seen: set[str] = set()
    config = {"train_batch_size": 1, "zero_optimization": {"stage": 1}}
    DeepSpeedConfig({**config, block: Recorded({}, seen)} if block else Recorded(copy.deepcopy(config), seen))
    return seen


def test_every_key_that_deepspeed_looks_up_has_a_row():
    seen = looked_up()
    assert len(seen) > 50 and seen <= set(keys_in(""))
    types = looked_up("data_types")
    assert "grad_accum_dtype" in types and types == set(keys_in("data_types"))


@pytest.mark.parametrize(
    "block, model",
    [
        ("zero_optimization", DeepSpeedZeroConfig),
        (OFFLOAD_OPTIMIZER, DeepSpeedZeroOffloadOptimizerConfig),
        (OFFLOAD_PARAM, DeepSpeedZeroOffloadParamConfig),
        ("bf16", DeepSpeedBF16Config),
        ("fp16", DeepSpeedFP16Config),
    ],
)
def test_every_field_of_deepspeeds_objects_has_a_row(block: str, model: Any):
    assert {f.alias or name for name, f in model.model_fields.items()} <= set(keys_in(block))


def test_what_is_handed_on_exists_in_deepspeed():
    known = {f.alias or name for name, f in DeepSpeedZeroConfig.model_fields.items()}
    assert {key.name for key in OF_JSON if key.block == "zero_optimization"} <= known
    assert {key.name for key in OF_JSON if key.block == ""} <= looked_up()
    assert set(keys_in("aio")) == set(AIO_DEFAULT_DICT)


def test_no_key_has_two_rows():
    assert len(TABLE) == len(RUN) + len(JSON) + len(ZERO) + len(REFUSED)


@pytest.mark.parametrize("key", OF_JSON, ids=lambda key: key.path)
def test_what_is_written_has_the_keys_type_and_is_not_refused(key: Key):
    assert key.default is None or key.adapter.validate_python(key.default) == key.default
    assert key.default not in key.refuses or key.default is None
    assert bool(key.refuses) == bool(key.reason)


@pytest.mark.parametrize("key", OF_JSON, ids=lambda key: key.path)
def test_every_accepted_key_says_what_proves_its_numbers(key: Key):
    assert key.parity is not None or key.nvme_only or key.name == "stage"


@pytest.mark.parametrize("key", [key for key in TABLE.values() if key.owner == "refused"], ids=lambda key: key.path)
def test_every_refusal_has_a_reason(key: Key):
    assert key.reason and key.parity is None and key.default is None


def fields_of(branch: type, prefix: str) -> set[str]:
    """Dotted paths of all fields below a branch of the run."""
    found = set()
    for name, kind in typing.get_type_hints(branch).items():
        inner = [k for k in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(k)]
        found |= {f"{prefix}{name}"} | {path for k in inner for path in fields_of(k, f"{prefix}{name}.")}
    return found


@pytest.mark.parametrize("key", [key for key in LEAVES if key.owner == "run"], ids=lambda key: key.path)
def test_a_key_of_the_run_names_the_field_that_decides_it(key: Key):
    if key.name != "gradient_accumulation_steps":  # follows from three
        assert key.decided_by in fields_of(RunConfig, "") | fields_of(ParallelConfig, "parallel.")
