"""The mesh: every rank has one place, groups divide the ranks, and what is impossible is refused at once."""

import itertools

import pytest

from dsllm.config.parallel import ParallelConfig
from dsllm.errors import ConfigError
from dsllm.mesh import AXES, Axis, Mesh, make_mesh

MESH = Mesh(pipeline=2, data=3, sequence=2, tensor=4, expert=3)


def test_every_place_is_taken_by_one_rank():
    places = [tuple(MESH.place(rank, axis) for axis in AXES) for rank in range(MESH.world_size)]
    # in order, the last axis fastest: exactly as nested loops count
    assert places == list(itertools.product(range(2), range(3), range(2), range(4)))


def test_tensor_parallel_ranks_are_neighbours():
    assert MESH.groups("tensor")[:2] == [(0, 1, 2, 3), (4, 5, 6, 7)]


@pytest.mark.parametrize("axes", [a for n in range(5) for a in itertools.combinations(AXES, n)], ids="-".join)
def test_groups_divide_the_ranks_and_differ_along_their_axes_only(axes: tuple[Axis, ...]):
    groups = MESH.groups(*axes)
    assert sorted(itertools.chain(*groups)) == list(range(MESH.world_size))
    for group in groups:
        for axis in AXES:
            places = {MESH.place(rank, axis) for rank in group}
            assert places == (set(range(MESH.size(axis))) if axis in axes else {MESH.place(group[0], axis)})


def test_data_parallelism_takes_all_ranks():
    assert make_mesh(ParallelConfig(), 6) == Mesh(data=6)


def test_everything_impossible_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        make_mesh(ParallelConfig(tensor=2, pipeline=2, expert=3), 6)
    assert [str(problem).partition(":")[0] for problem in caught.value.problems] == [
        "parallel.tensor",
        "parallel.pipeline",
        "parallel.expert",
        "parallel",
    ]
    text = str(caught.value)
    assert "does not divide the 6 ranks" in text and text.count("data parallelism only") == 3


def test_experts_divide_the_data_parallel_ranks():
    with pytest.raises(
        ConfigError, match=r"parallel.expert: 4 does not divide the 3 data-parallel ranks \(6 ranks / 2\)"
    ):
        make_mesh(ParallelConfig(tensor=2, expert=4), 6)
