"""fp32 under ZeRO keeps one copy of the weights, and gradients once; tests/parity says that the numbers are right."""

import pytest
import torch

from dsllm.engine.deepspeed_library import deepspeed
from dsllm.engine.optimizers import set_learning_rate
from dsllm.engine.processes.process_group import World
from dsllm.engine.state import owned_slices
from dsllm.slices import WEIGHTS
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_engine, tiny_run, tiny_step


def shared(world: World) -> list[bool]:
    """By stage: whether a change of the weights' own memory shows in the masters, before and after two steps."""
    found = []
    for stage in (1, 2, 3):
        engine = tiny_engine(world, config := tiny_run(precision="fp32"), stage)
        optimizer = engine.optimizer
        weights = optimizer.fp16_partitioned_groups_flat if stage == 3 else optimizer.bit16_groups_flat
        owned = {tensor.untyped_storage().data_ptr() for tensor in weights}
        for step in range(2):
            masters = {piece.tensors[WEIGHTS].untyped_storage().data_ptr() for piece in owned_slices(engine)}
            found.append(masters <= owned)
            set_learning_rate(engine.optimizer, 1e-3)
            tiny_step(engine, config, step)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_masters_are_the_weights(world_size):
    assert all(all(of_rank) for of_rank in run_ranks(world_size, shared))


def masters_by_parameter(world: World) -> list[bool]:
    """Whether what DeepSpeed gives as a parameter's master is the weight, after a step."""
    found = []
    for stage in (1, 2):
        engine = tiny_engine(world, config := tiny_run(precision="fp32"), stage)
        set_learning_rate(engine.optimizer, 1e-3)
        tiny_step(engine, config, 0)
        for parameter in engine.module.parameters():
            found.append(torch.equal(deepspeed.utils.safe_get_full_fp32_param(parameter), parameter.data))
    return found


def test_a_masters_view_by_parameter_follows():
    assert all(run_ranks(2, masters_by_parameter)[1])


def held_gradients(world: World, stage: int) -> tuple[int, list[int], list[int]]:
    """After the last backward pass: gradients that parameters keep, elements of each group's sum, and of its masters."""
    engine = tiny_engine(world, config := tiny_run(precision="fp32"), stage)
    step, seen = engine.deepspeed.step, []

    def look() -> None:
        if engine.deepspeed.is_gradient_accumulation_boundary():
            groups = engine.optimizer.averaged_gradients.values()
            seen.append(
                (sum(p.grad is not None for p in engine.module.parameters()), [g.flat_partition for g in groups])
            )
        step()

    engine.deepspeed.step = look
    tiny_step(engine, config, 0)
    ((kept, sums),) = seen
    return kept, [len(flat) for flat in sums], [len(m) for m in engine.optimizer.single_partition_of_fp32_groups]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_add_up_in_the_tensor_that_the_optimizer_reads(world_size, stage):
    for kept, sums, masters in run_ranks(world_size, held_gradients, stage):
        assert kept == 0 and sums == masters
