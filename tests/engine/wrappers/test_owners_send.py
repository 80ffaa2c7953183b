"""Gathering by broadcasts gives every rank the bits that DeepSpeed's all-gather gives."""

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import all_gather_dp_groups

from dsllm.config.train import Precision
from dsllm.engine.instruments.operator_counts import Counting
from dsllm.engine.processes.process_group import World
from dsllm.engine.wrappers.owners_send import broadcast_parts
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_engine, tiny_run, tiny_step

SIZES = (5, 1000)
"""Elements of a rank's part, by optimizer group."""


def gathered_both_ways(world: World, dtype: torch.dtype) -> bool:
    """Whether all groups are equal to what DeepSpeed's own function gathers of the same parts."""
    found = []
    for gather in (all_gather_dp_groups, broadcast_parts):
        flats, parts = [], []
        for size in SIZES:
            flat = torch.zeros(size * world.size, dtype=dtype)
            parts.append(list(flat.chunk(world.size)))
            generator = torch.Generator().manual_seed(world.rank)
            parts[-1][world.rank].copy_(torch.randn(size, generator=generator))
            flats.append(flat)
        group = dist.group.WORLD
        assert group is not None
        gather(flats, parts, [group] * len(SIZES), 2, 500)
        assert all(flat.count_nonzero() == flat.numel() for flat in flats)
        found.append(flats)
    return all(torch.equal(own, theirs) for own, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_same_bits_as_all_gather(world_size, dtype):
    assert all(run_ranks(world_size, gathered_both_ways, dtype))


def kinds_of_a_step(world: World, precision: Precision, stage: int) -> set[str]:
    """The kinds of collectives that move more than the norms do."""
    engine = tiny_engine(world, config := tiny_run(precision=precision), stage)
    with Counting() as counting:
        tiny_step(engine, config, 0)
    return {kind for kind, size in counting.communication_bytes.items() if size > 1000}


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)])
def test_a_step_gathers_its_weights_by_broadcasts(precision, stage):
    assert run_ranks(2, kinds_of_a_step, precision, stage) == [{"all_reduce", "broadcast"}] * 2
