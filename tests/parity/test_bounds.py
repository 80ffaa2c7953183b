"""The bounds: they grow with every rounding, and only by it."""

import numpy as np
import pytest

from dsllm.parity.bounds import UNIT_ROUNDOFF, bounds_for, roundings
from dsllm.parity.combinations import Combination
from dsllm.parity.reference import Reference

REFERENCE = Reference([1.0], [1.0], {"w": np.ones(100, np.float32)}, 1.0)


def share(**fields) -> float:
    return bounds_for(Combination(**fields), REFERENCE).weights


@pytest.mark.parametrize("name, dtype", [("fp32", np.float32), ("fp16", np.float16)])
def test_the_unit_roundoff_is_half_the_distance_to_the_next_number(name, dtype):
    assert UNIT_ROUNDOFF[name] == float(np.nextafter(dtype(1), dtype(2)) - dtype(1)) / 2


def test_formats_and_how_often_a_gradient_is_rounded_to_each():
    assert roundings(Combination(stage=2, world_size=4)) == (None, {})
    assert roundings(Combination(stage=2, precision="fp32_compute_bf16")) == ("bf16", {"bf16": 2.0})
    # at stages 1 to 3 gradients of 16-bit weights are summed and sent in fp32, unless asked otherwise
    assert roundings(Combination(stage=2, precision="bf16", world_size=4, accumulation=3)) == ("bf16", {"bf16": 2.0})
    asked = {"grad_accum_dtype": "bf16", "communication_data_type": "bf16"}
    both = Combination(stage=2, precision="bf16", world_size=4, accumulation=3, deepspeed=asked)
    assert roundings(both) == ("bf16", {"bf16": 2.0 + 2 + 4})
    assert roundings(Combination(stage=0, precision="bf16", world_size=4)) == ("bf16", {"bf16": 2.0 + 0 + 4})
    sent = Combination(stage=1, world_size=2, deepspeed={"communication_data_type": "bf16"})
    assert roundings(sent) == (None, {"bf16": 2.0})


def test_bounds_grow_with_the_roundings():
    assert share() < share(accumulation=3) < share(accumulation=3, world_size=4)
    assert share(accumulation=3, world_size=4) < share(stage=1, precision="fp16") < share(stage=1, precision="bf16")


def test_a_loss_is_bounded_more_tightly_than_the_weights():
    for precision in UNIT_ROUNDOFF:
        bounds = bounds_for(Combination(stage=1, precision=precision), REFERENCE)
        assert 0 < bounds.loss < bounds.weights == bounds.norm
