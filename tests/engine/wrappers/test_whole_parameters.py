"""ZeRO-0: norm, clipping and skipped steps, which DeepSpeed leaves to us in fp32, and no reduction on one rank."""

import math

import pytest
import torch

from dsllm.engine.optimizers import set_learning_rate
from dsllm.engine.processes.process_group import World
from dsllm.engine.step import accumulate_gradients, update
from dsllm.objectives import TokenLoss
from dsllm.slices import WEIGHTS
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import GLOBAL_BATCH, SEQUENCE_LENGTH, micro_batches, tiny_engine, tiny_run

COUNT = GLOBAL_BATCH * SEQUENCE_LENGTH
CLIPPING = 0.25


def clipped(world: World, clipping: float) -> tuple[float, float, float, float]:
    """Norm of the gradient by hand, as reported, what the first moment has of it, and whether gradients are reduced."""
    config = tiny_run(gradient_clipping=clipping)
    engine = tiny_engine(world, config, 0)
    set_learning_rate(engine.optimizer, 1e-3)
    batches = micro_batches(config, 0, world.data_rank, world.data_size)
    accumulate_gradients(engine, batches, TokenLoss(), 0, COUNT)
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in engine.module.parameters()))
    outcome = update(engine)
    moments = [engine.wrapper.tensors(piece)["exp_avg"] for piece in engine.wrapper.pieces()]
    applied = math.sqrt(sum(float(m.double().square().sum()) for m in moments)) / (1 - config.train.optimizer.beta1)
    assert outcome.applied
    return norm, outcome.gradient_norm, applied, float(engine.deepspeed.enable_backward_allreduce)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("clipping", [0.0, CLIPPING])
def test_the_norm_is_measured_before_clipping_and_the_update_is_clipped(clipping, world_size):
    norm, reported, applied, reduces = run_ranks(world_size, clipped, clipping)[0]
    assert norm > 2 * CLIPPING
    # fp32 sums of 10^5 squares
    assert reported == pytest.approx(norm, rel=1e-5)
    # torch divides by norm + 1e-6
    assert applied == pytest.approx(clipping or norm, rel=1e-5)
    assert reduces == (world_size > 1)


def poisoned(world: World) -> tuple[float, bool, bool, bool]:
    """An update with one infinite gradient: the outcome, whether anything moved, and whether the next one is good."""
    config = tiny_run()
    engine = tiny_engine(world, config, 0)
    batches = micro_batches(config, 0, world.data_rank, world.data_size)
    pieces = list(engine.wrapper.pieces())
    before = [piece.owner.detach().clone() for piece in pieces]
    accumulate_gradients(engine, batches, TokenLoss(), 0, COUNT)
    next(engine.module.parameters()).grad[0, 0] = math.inf
    outcome = update(engine)
    untouched = all(torch.equal(piece.owner, old) for piece, old in zip(pieces, before, strict=True))
    untouched &= all(set(engine.wrapper.tensors(piece)) == {WEIGHTS} for piece in pieces)
    accumulate_gradients(engine, batches, TokenLoss(), 1, COUNT)
    return outcome.gradient_norm, outcome.applied, untouched, update(engine).applied


def test_an_infinite_gradient_is_dropped():
    ((norm, applied, untouched, good),) = run_ranks(1, poisoned)
    assert not math.isfinite(norm) and not applied and untouched and good
