"""Communication by formula, from the settings of a step; tests/engine/instruments/test_operator_counts.py measures it."""

import dataclasses
from typing import Any

import pytest

from dsllm.counts import Communication, communication_bytes, communication_of_step
from dsllm.parameters import parameter_table
from tests.helpers.models import LLAMA

TABLE = parameter_table(LLAMA, 64)
TOTAL = sum(parameter.num_elements for parameter in TABLE)


@pytest.mark.parametrize(
    ("stage", "wanted"),
    [
        (0, Communication(all_reduce=4000)),
        (1, Communication(all_reduce=4000, gather=2000)),
        (2, Communication(all_reduce=12_000, gather=2000)),
        (3, Communication(reduce_scatter=12_000, gather=3 * 2 * 900 + 2 * 100)),
    ],
)
def test_communication_of_a_step_with_three_micro_batches(stage: int, wanted: Communication):
    # 1000 parameters, fp32 gradients, 16-bit weights; ZeRO-3 keeps 100 of them whole, and gathers those once a step
    assert communication_bytes(1000, stage, 3, 4, 2, gathered_per_micro_batch=900 if stage == 3 else None) == wanted


def test_a_ring_sends_an_all_reduce_twice_and_nothing_on_one_rank():
    communication = Communication(all_reduce=1000, reduce_scatter=400, gather=200)
    assert communication.handed == 1600
    assert [communication.on_wire(size) for size in (1, 2, 4)] == [0, 1300, 1950]


def final_config(stage: int, **zero: Any) -> dict[str, Any]:
    limits = {
        "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": TOTAL, "stage3_max_reuse_distance": 0
    }  # fmt: skip
    return {"zero_optimization": {"stage": stage, **limits, **zero}, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_takes_its_widths_from_precision_and_json(stage: int):
    final = final_config(stage)
    assert communication_of_step(TABLE, final, "fp32") == communication_bytes(TOTAL, stage, 2, 4, 4)
    assert communication_of_step(TABLE, final, "fp32_compute_bf16") == communication_bytes(TOTAL, stage, 2, 4, 4)
    assert communication_of_step(TABLE, final, "bf16") == communication_bytes(TOTAL, stage, 2, 2, 2)
    wide = final | {"communication_data_type": "fp32"}
    assert communication_of_step(TABLE, wide, "bf16") == communication_bytes(TOTAL, stage, 2, 4, 2)


def test_zero_3_gathers_what_is_not_persistent_and_twice_what_it_may_not_keep():
    small = sum(p.num_elements for p in TABLE if p.num_elements <= 48)  # the norms
    assert small == 7 * 48
    persistent = communication_of_step(TABLE, final_config(3, stage3_param_persistence_threshold=48), "fp32")
    assert persistent.gather == 4 * (2 * (TOTAL - small) + small)
    twice = communication_of_step(TABLE, final_config(3, stage3_max_live_parameters=TOTAL - 1), "fp32")
    assert twice.gather == 4 * 2 * 2 * TOTAL
    assert twice == dataclasses.replace(persistent, gather=twice.gather)
