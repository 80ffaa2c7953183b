"""Offload and ZeRO++'s hpZ move the states and change no numbers: against the same stage without them."""

import math
from typing import Any

import pytest
import torch

from dsllm.config.run import RunConfig
from dsllm.engine.optimizers import set_learning_rate
from dsllm.engine.processes.process_group import World
from dsllm.engine.state import load_state, owned_slices
from dsllm.engine.step import take_step
from dsllm.objectives import TokenLoss
from tests.engine.test_step import BF16_NORM_TOLERANCE, NORM_TOLERANCE, counting, learning_rate
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import SEQUENCE_LENGTH, first_state, micro_batches, tiny_engine, tiny_run, tiny_step

NUM_STEPS = 6
Curve = tuple[list[float], list[float]]
"""Losses and gradient norms, step by step."""
CPU = {"device": "cpu"}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "plain-1": (1, {}),
    "optimizer-1": (1, {"offload_optimizer": CPU}),
    "plain-2": (2, {}),
    "optimizer-2": (2, {"offload_optimizer": CPU}),
    "plain-3": (3, {}),
    "optimizer-3": (3, {"offload_optimizer": CPU}),
    "parameters-3": (3, {"offload_param": CPU}),
    "both-3": (3, {"offload_optimizer": CPU, "offload_param": CPU}),
    "hpz-3": (3, {"zero_hpz_partition_size": 2}),
    "hpz-both-3": (3, {"zero_hpz_partition_size": 2, "offload_optimizer": CPU, "offload_param": CPU}),
}


def curves(world: World, config: RunConfig, cases: tuple[str, ...], num_steps: int = NUM_STEPS) -> dict[str, Curve]:
    """Losses and gradient norms of each case."""
    found: dict[str, Curve] = {}
    for case in cases:
        stage, zero = CASES[case]
        engine = tiny_engine(world, config, stage, **zero)
        losses, norms = [], []
        for step in range(num_steps):
            set_learning_rate(engine.optimizer, learning_rate(step))
            result = tiny_step(engine, config, step)
            losses.append(result.loss)
            norms.append(result.gradient_norm)
        found[case] = losses, norms
    return found


ALONE = tuple(case for case in CASES if "hpz" not in case)  # one rank has no other to keep a second copy for


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "precision", "cases"),
    [(2, "fp32", tuple(CASES)), (2, "bf16", tuple(CASES)), (4, "fp32", tuple(CASES)), (1, "fp32", ALONE)],
)
def test_the_same_numbers_as_without(precision, world_size, cases):
    """dsllm/parity compares the same cases with plain PyTorch.

    Unclipped, because an offloaded optimizer sums the norm's squares in another order or type, which may change the last
    bit of the norm, and so of the clipping factor: weights and losses depend on nothing else of it.
    """
    config = tiny_run(precision=precision, micro_batch_sequences=8 // (2 * world_size), gradient_clipping=0.0)
    found = run_ranks(world_size, curves, config, cases)[0]
    norm_tolerance = NORM_TOLERANCE if precision == "fp32" else BF16_NORM_TOLERANCE
    for case, (losses, norms) in found.items():
        plain_losses, plain_norms = found[f"plain-{case[-1]}"]
        if (case, precision) == ("optimizer-1", "bf16"):  # another class of DeepSpeed's, which adds in another order
            assert losses == pytest.approx(plain_losses, rel=BF16_NORM_TOLERANCE / 10)
        elif (case, world_size) == (
            "optimizer-1",
            4,
        ):  # reduced in buckets, not at once: on over two ranks in another order
            assert losses == pytest.approx(plain_losses, rel=NORM_TOLERANCE / 10)
        else:
            assert losses == plain_losses, case
        assert norms == pytest.approx(plain_norms, rel=norm_tolerance), case


def reload_after_steps(world: World, config: RunConfig, cases: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """First loss of a new engine, and of one that has trained and was then given the same state."""
    found = {}
    batches = micro_batches(config, 5, world.data_rank, world.data_size)
    for case in cases:
        stage, zero = CASES[case]
        first = take_step(tiny_engine(world, config, stage, **zero), batches, TokenLoss(), seed=5).loss
        engine = tiny_engine(world, config, stage, **zero)
        for step in range(3):
            tiny_step(engine, config, step)
        load_state(engine, first_state(config))
        found[case] = first, take_step(engine, batches, TokenLoss(), seed=5).loss
    return found


@pytest.mark.slow
def test_no_stale_parameters_after_loading():
    """Every copy of the weights, ZeRO++'s second one too, follows what is loaded."""
    for first, again in run_ranks(2, reload_after_steps, tiny_run(), tuple(CASES))[0].values():
        assert first == again


def poisoned_steps(world: World, config: RunConfig, cases: tuple[str, ...]) -> dict[str, tuple[bool, bool, bool]]:
    """A step in which one rank's loss is not a number: applied, state untouched, next step good."""
    found = {}
    for case in cases:
        stage, zero = CASES[case]
        engine = tiny_engine(world, config, stage, **zero)
        tiny_step(engine, config, 0)
        before = [t.clone() for piece in owned_slices(engine) for t in piece.tensors.values()]
        batches = micro_batches(config, 1, world.data_rank, world.data_size)
        weights = torch.ones(2, SEQUENCE_LENGTH)
        if world.rank == 1:
            weights[0, 3] = math.nan
        result = take_step(engine, [counting(batches[0], weights), *batches[1:]], TokenLoss(weighted=True), seed=1)
        after = [t for piece in owned_slices(engine) for t in piece.tensors.values()]
        untouched = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        good = tiny_step(engine, config, 2).applied
        found[case] = result.applied, untouched, good
    return found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_no_number_changes_nothing(precision):
    for of_rank in run_ranks(2, poisoned_steps, tiny_run(precision=precision), tuple(CASES)):
        for case, result in of_rank.items():
            assert result == (False, True, True), case
