"""ZeRO-1 and 2: each rank has one part of every group, cut wherever the middle is, and rank order is element order."""

import pytest

from dsllm.engine.optimizers import optimizer_groups
from dsllm.engine.processes.process_group import World
from tests.helpers.engines import engine_of
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import TABLE, tiny_run

CASES = [("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)]
"""The second last is DeepSpeed's BF16_Optimizer."""


def parts(world: World, precision: str, stage: int) -> dict[int, list[tuple[str, int, int]]]:
    """This rank's ranges of each group, in the order of the group's flat tensor."""
    engine = engine_of(world, tiny_run(precision=precision), stage)
    found: dict[int, list[tuple[str, int, int]]] = {}
    for piece in engine.wrapper.trainable_pieces():
        assert piece.offset + piece.count <= piece.owner.numel() and not piece.replicated
        found.setdefault(piece.group, []).append((piece.name, piece.start, piece.start + piece.count))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("precision", "stage"), CASES)
def test_each_rank_has_one_part_of_every_group(precision, stage, world_size):
    by_rank = run_ranks(world_size, parts, precision, stage)
    sizes = {row.name: row.num_elements for row in TABLE}
    for number, group in enumerate(optimizer_groups(TABLE, tiny_run().train.optimizer)):
        ranges = [part for of_rank in by_rank for part in of_rank.get(number, [])]
        covered = {name: sum(stop - start for n, start, stop in ranges if n == name) for name in group.names}
        assert covered == {name: sizes[name] for name in group.names}
        assert {name for name, _, _ in ranges} == set(group.names)
        # nothing divides evenly: two ranks share one parameter of each group, cut inside
        cut = [name for name, start, stop in ranges if stop - start < sizes[name]]
        assert len(cut) == 2 * (world_size - 1) and len(set(cut)) == world_size - 1
