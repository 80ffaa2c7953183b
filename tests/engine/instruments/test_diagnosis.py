"""A run that cannot recover says which module and which micro-batch is not finite first, and has changed nothing."""

import math

import pytest
import torch

from dsllm.config.train import LossScaleConfig, Precision
from dsllm.engine.build import Engine
from dsllm.engine.instruments.diagnosis import NotFinite, find_not_finite
from dsllm.engine.processes.process_group import World
from dsllm.engine.state import owned_slices
from dsllm.engine.step import take_step
from dsllm.objectives import TokenLoss
from dsllm.slices import Region
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import first_state, micro_batches, tiny_engine, tiny_run

CASES: tuple[tuple[Precision, int], ...] = (
    *(("fp16", stage) for stage in (1, 2, 3)),
    *(("bf16", stage) for stage in (0, 1, 3)),
    *(("fp32", stage) for stage in (0, 2, 3)),
)


BROKEN_ROW = 255
"""Of the embedding: a token that the tiny data does not have."""


class Planted:
    """The initial values, with some parameters multiplied, and one row of the embedding not a number."""

    def __init__(self, factors: dict[str, float]):
        self.inner = first_state(tiny_run())
        self.factors = factors

    def read(self, name: str, key: str, region: Region) -> torch.Tensor:
        """See StateReader."""
        values = (self.inner.read(name, key, region).double() * self.factors.get(name, 1)).float()
        if name == "embed.weight":
            width = region.box.shape[1]
            values[max(0, BROKEN_ROW * width - region.start) :] = math.nan
        return values

    def keys(self, name: str) -> tuple[str, ...]:
        """See StateReader."""
        return self.inner.keys(name)

    def scalars(self, name: str) -> dict[str, float]:
        """See StateReader."""
        return {}


def state_of(engine: Engine) -> list[torch.Tensor]:
    """Bit by bit: a NaN does not equal itself."""
    return [t.clone().view(torch.int32) for piece in owned_slices(engine) for t in piece.tensors.values()]


def look_for(
    world: World, factors: dict[Precision, dict[str, float]], poison: tuple[int, int] | None
) -> dict[tuple[str, int], NotFinite | None]:
    """What is found in a step; `poison` is the rank and the micro-batch that hold the broken token."""
    found = {}
    for precision, stage in CASES:
        config = tiny_run(precision=precision, micro_batch_sequences=2, loss_scale=LossScaleConfig(initial_power=4))
        planted = Planted(factors.get(precision, {}))
        engine = tiny_engine(world, config, stage, planted, device="cuda" if precision == "fp16" else "cpu")
        batches = micro_batches(config, 0, world.data_rank, world.data_size)
        if poison is not None and poison[0] == world.rank:
            batches[poison[1]].inputs[0, 5] = BROKEN_ROW
        if factors or poison is not None:
            assert not take_step(engine, batches, TokenLoss(), seed=3).applied
        before, steps = state_of(engine), engine.deepspeed.global_steps
        found[precision, stage] = find_not_finite(engine, batches, TokenLoss(), seed=3)
        assert all(torch.equal(a, b) for a, b in zip(before, state_of(engine), strict=True))
        assert engine.deepspeed.global_steps == steps
    return found


@pytest.mark.slow
def test_a_weight_that_overflows_is_found_in_its_module():
    """Outputs there are about 0.05 x sqrt(56) = 0.4: times 1e6 beyond fp16's 65504, times 1e39 beyond 3.4e38."""
    name = "layers.1.mlp.up.weight"
    factors = {"fp16": 1e6, "bf16": 1e39, "fp32": 1e39}
    shares = run_ranks(2, look_for, {precision: {name: factor} for precision, factor in factors.items()}, None)
    assert shares[0] == shares[1]
    for case, found in shares[0].items():
        assert found is not None and (found.passing, found.micro_batch, found.rank) == ("forward", 0, 0), case
        assert found.where == "the output of layers.1.mlp.up" and found.num_ranks == 2, (case, found)


@pytest.mark.slow
def test_a_poisoned_micro_batch_is_found_on_its_rank():
    for case, found in run_ranks(2, look_for, {}, (1, 1))[0].items():
        assert found is not None and (found.passing, found.micro_batch, found.rank) == ("forward", 1, 1), (case, found)
        assert found.where == "the output of embed" and found.num_ranks == 1, (case, found)
        assert str(found) == "the output of embed, in the forward pass of micro-batch 1 on rank 1"


@pytest.mark.slow
def test_nothing_is_found_where_all_is_well():
    assert set(run_ranks(2, look_for, {}, None)[0].values()) == {None}


def gradient_overflow(world: World, factors: dict[str, float], power: int) -> NotFinite | None:
    """What is found in fp16 at ZeRO-2 with that loss scale."""
    config = tiny_run(precision="fp16", loss_scale=LossScaleConfig(initial_power=power))
    engine = tiny_engine(world, config, 2, Planted(factors), device="cuda")
    return find_not_finite(engine, micro_batches(config, 0, world.data_rank, world.data_size), TokenLoss(), seed=0)


def test_a_gradient_that_overflows_is_found_in_the_backward_pass():
    """The two factors cancel in the MLP's output, and the gradient of its last matrix is 1e4 times the usual."""
    factors = {"layers.1.mlp.up.weight": 1e4, "layers.1.mlp.down.weight": 1e-4}
    (found,) = run_ranks(1, gradient_overflow, factors, 14)
    assert str(found) == "the gradient of layers.1.mlp.down.weight, in the backward pass of micro-batch 0 on rank 0"


def test_a_loss_scale_beyond_fp16_is_found_where_the_loss_is_made():
    (found,) = run_ranks(1, gradient_overflow, {}, 30)
    assert found is not None and found.passing == "backward" and "head" in found.where, found
