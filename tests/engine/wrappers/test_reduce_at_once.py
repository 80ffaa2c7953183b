"""A gradient that is reduced as one tensor, and measured in pieces, trains to the bits of DeepSpeed's own way."""

import pytest
import torch

from dsllm.engine.optimizers import set_learning_rate
from dsllm.engine.processes.process_group import World
from dsllm.engine.wrappers import reduce_at_once
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_engine, tiny_run, tiny_step

STEPS = 3


def trained(world: World, own_way: bool) -> tuple[list[tuple[float, float]], torch.Tensor]:
    """Losses and norms of some steps, and the weights after them."""
    engine = tiny_engine(world, config := tiny_run(precision="fp32"), 1)
    if own_way:  # as it is without the fixes: what hides DeepSpeed's methods is taken off the object
        del engine.optimizer.reduce_gradients, engine.optimizer.get_grad_norm_direct
        engine.optimizer.reduce_bucket_size = 1000  # elements, in several buckets
    found = []
    for step in range(STEPS):
        set_learning_rate(engine.optimizer, 1e-3)
        result = tiny_step(engine, config, step)
        found.append((result.loss, result.gradient_norm))
    return found, torch.cat([p.detach().view(-1) for p in engine.module.parameters()])


def both_ways(world: World) -> bool:
    """Whether the numbers are the same."""
    (ours, weights), (theirs, their_weights) = trained(world, False), trained(world, True)
    return ours == theirs and torch.equal(weights, their_weights)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_same_bits_as_parameter_by_parameter(world_size):
    assert all(run_ranks(world_size, both_ways))


def norms(world: World, pieces: tuple[int, ...]) -> list[float]:
    """The same step's norm, measured in pieces of so many elements."""
    found = []
    for elements in pieces:
        reduce_at_once.NORM_ELEMENTS = elements
        engine = tiny_engine(world, config := tiny_run(precision="fp32"), 2)
        found.append(tiny_step(engine, config, 0).gradient_norm)
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_norm_does_not_depend_on_the_pieces(world_size):
    """Sums differ in fp64's last bits, which are gone in fp32."""
    for of_rank in run_ranks(world_size, norms, (7, 1000, 2**17)):
        assert len(set(of_rank)) == 1
