"""ZeRO-3: each rank has its part of every parameter, padding left out, in sub-groups of a limited size."""

import pytest

from dsllm.engine.optimizers import optimizer_groups
from dsllm.engine.processes.process_group import World
from tests.helpers.engines import engine_of
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import SMALL_BUCKETS, TABLE, tiny_run

NUM_GROUPS = len(optimizer_groups(TABLE, tiny_run().train.optimizer))
SIZES = {row.name: row.num_elements for row in TABLE}


def parts(world: World, precision: str) -> tuple[dict[str, tuple[int, int]], int]:
    """The range that this rank has of each parameter, and the number of sub-groups."""
    engine = engine_of(world, tiny_run(precision=precision, global_batch_sequences=12), 3)
    pieces = list(engine.wrapper.trainable_pieces())
    assert all(piece.swapped is None and not piece.replicated for piece in pieces)
    return {p.name: (p.start, p.start + p.count) for p in pieces}, len({id(p.owner) for p in pieces})


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_rank_has_its_part_of_every_parameter(world_size, precision):
    found = run_ranks(world_size, parts, precision)
    for name, size in SIZES.items():
        width = -(-size // world_size)
        expected = [(rank * width, min(size, (rank + 1) * width)) for rank in range(world_size)]
        assert [ranges.get(name) for ranges, _ in found] == [e if e[0] < e[1] else None for e in expected]
    assert all(groups > NUM_GROUPS for _, groups in found), "sub-groups cut the optimizer's groups"


def kept_whole(world: World) -> list[str]:
    """The parameters that every rank keeps whole once the state is loaded."""
    engine = engine_of(world, tiny_run(), 3)
    return [name for name, p in engine.module.named_parameters() if p.numel() == p.ds_numel]


def test_small_parameters_stay_whole_and_no_others():
    limit = SMALL_BUCKETS["stage3_param_persistence_threshold"]
    small = [name for name, size in SIZES.items() if size < limit]
    assert small and run_ranks(2, kept_whole) == [small, small]
