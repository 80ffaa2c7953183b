"""One training set-up: its name, its DeepSpeed JSON, and the full product."""

import itertools

import pytest

from dsllm.config.train import PRECISIONS
from dsllm.engine.settings.final_config import final_config
from dsllm.engine.settings.layout import Layout
from dsllm.errors import ConfigError
from dsllm.mesh import Mesh
from dsllm.parity.combinations import (
    ACCUMULATIONS,
    DEEPSPEED_SETTINGS,
    STAGES,
    WORLD_SIZES,
    Combination,
    full_product,
)
from dsllm.parity.tiny_run import run_of


def accepted(row: Combination) -> bool:
    """Whether the config accepts a row; fp16 counts as on a GPU."""
    layout = Layout(mesh=Mesh(data=row.world_size), device="cuda", precision=row.precision)
    try:
        final_config(run_of(row, 0), row.deepspeed_json(), layout)
    except ConfigError:
        return False
    return True


def test_the_product_is_full_but_for_what_is_refused():
    every = itertools.product(STAGES, PRECISIONS, ACCUMULATIONS, (True, False), WORLD_SIZES)
    wanted = {
        (s, p, a, c, w)
        for s, p, a, c, w in every
        if accepted(Combination(stage=s, precision=p, accumulation=a, clipping=c, world_size=w))
    }
    got = {(c.stage, c.precision, c.accumulation, c.clipping, c.world_size) for c in full_product()}
    assert got == wanted and len(got) == 180


def test_the_config_accepts_the_full_product():
    assert all(accepted(row) for row in full_product())


def test_a_name_is_the_place_and_then_every_setting_that_differs():
    settings = {"offload_optimizer": "cpu", "overlap_comm": False, "communication_data_type": "bf16"}
    row = Combination(stage=2, precision="bf16", world_size=4, accumulation=3, masked=True, deepspeed=settings)
    assert row.name == (
        "zero2 bf16 ranks=4 accumulation=3 clipping=on masked=True communication_data_type=bf16 overlap_comm=False "
        "offload_optimizer=cpu"
    )
    assert Combination(clipping=False).name == "zero0 fp32 ranks=1 accumulation=1 clipping=off"


def test_the_json_puts_every_setting_where_deepspeed_reads_it():
    settings = {
        "offload_optimizer": "cpu",
        "grad_accum_dtype": "fp32",
        "prescale_gradients": False,
        "overlap_comm": True,
    }
    assert Combination(stage=1, deepspeed=settings).deepspeed_json() == {
        "data_types": {"grad_accum_dtype": "fp32"},
        "prescale_gradients": False,
        "zero_optimization": {"stage": 1, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}},
    }
    assert Combination().deepspeed_json() == {"zero_optimization": {"stage": 0}}


def test_every_setting_is_named_for_programs():
    values = Combination(deepspeed={"overlap_comm": False}).as_dict()
    assert set(DEEPSPEED_SETTINGS) < set(values) and "deepspeed" not in values
    assert values["overlap_comm"] is False and values["reduce_scatter"] is None and values["clipping"] is True


def test_equal_combinations_are_one_key_of_a_dict_and_different_ones_are_two():
    one, same, other = (Combination(deepspeed={"overlap_comm": value}) for value in (True, True, False))
    assert len({one, same, other}) == 2


def test_a_setting_that_no_key_has_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="overlap_com"):
        Combination(deepspeed={"overlap_com": True})
