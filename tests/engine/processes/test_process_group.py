"""The ranks' few collectives, along the axes of their mesh, and what is said when one of them is lost."""

import dataclasses
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dsllm.engine.processes.local_ranks import RankError
from dsllm.engine.processes.process_group import (
    World,
    _make_groups,
    bound_all_groups,
    lost_ranks_named,
    own_groups,
    process_group,
    variables_for_deepspeed,
)
from dsllm.engine.processes.ranks import Ranks
from dsllm.mesh import Mesh
from dsllm.processes import free_port
from tests.helpers.ranks import context, run_ranks


def collectives(world: World) -> tuple[list[float], list[int], object, tuple[int, int, bool]]:
    return (
        world.sum([world.rank + 1, 2.0**52]),
        world.gather(world.rank * 10),
        world.send_from_rank_0({"from": world.rank}),
        (world.data_rank, world.data_size, world.is_first_reader),
    )


@pytest.mark.parametrize("size", [1, 3])
def test_collectives_over_all_ranks(size):
    for rank, found in enumerate(run_ranks(size, collectives)):
        sums, gathered, sent, place = found
        assert sums == [size * (size + 1) / 2, size * 2.0**52], "whole numbers are exact"
        assert gathered == [10 * r for r in range(size)] and sent == {"from": 0}
        assert place == (rank, size, True)


def along_axes(world: World) -> tuple[dict[str, float], int, bool]:
    """The sum of the ranks' numbers along each axis of a mesh with two of them."""

    mesh = Mesh(data=2, tensor=2)
    groups = _make_groups(mesh, world.rank, world.timeout)
    assert set(groups) == {"data", "tensor"}
    world = dataclasses.replace(world, mesh=mesh, groups=groups)
    axes = ("world", "data", "tensor", "pipeline")
    return {over: world.sum([world.rank], over=over)[0] for over in axes}, world.data_rank, world.is_first_reader


def test_sums_along_one_axis_of_the_mesh():
    """Neighbours are tensor-parallel: 0 and 1 share a model, and so do 2 and 3."""
    expected = [({"world": 6, "data": rank % 2 + rank % 2 + 2, "tensor": 4 * (rank // 2) + 1, "pipeline": rank},
                 rank // 2, rank % 2 == 0) for rank in range(4)]  # fmt: skip
    assert run_ranks(4, along_axes) == expected


def wait_for_a_rank_that_dies(world: World) -> None:
    """Rank 1 ends without a word, as if it was killed; rank 0 raises what a run would show."""
    if world.rank == 1:
        os._exit(0)
    with lost_ranks_named(world, "train.timeout_minutes", "advice"):
        dist.recv(torch.zeros(1), src=1)


def test_a_rank_that_is_lost_is_named_with_what_to_do():
    with pytest.raises(RankError, match="LaunchError: rank 0 of 2 lost another rank") as caught:
        run_ranks(2, wait_for_a_rank_that_dies)
    assert "it hung for train.timeout_minutes=30; advice (" in str(caught.value)
    assert "rank 1: died without a result" in str(caught.value)


def other_errors(world: World) -> str:
    with pytest.raises(RuntimeError) as caught, lost_ranks_named(world):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    return str(caught.value)


def test_other_errors_keep_their_words():
    assert run_ranks(1, other_errors) == ["mat1 and mat2 shapes cannot be multiplied"]


def all_groups(world: World) -> int:
    own = dist.new_group([0, 1])
    bound_all_groups(timedelta(seconds=5))
    assert own in own_groups()
    return len(own_groups())


def test_groups_made_by_others_are_bound_too():
    assert min(run_ranks(2, all_groups)) >= 2


def leave_before_the_last_barrier(folder: Path, rank: int, port: int, answers) -> None:
    local = Ranks(rank=rank, local_rank=rank, world_size=2, local_size=2, launcher="test",
                  master_address="127.0.0.1", master_port=port)  # fmt: skip
    with process_group(local, torch.device("cpu")) as world:
        world.barrier()
        if rank == 1:
            os._exit(9)
    answers.put("ended well")


def test_a_rank_that_is_lost_after_all_is_done_changes_nothing(tmp_path):
    answers, port = context.Queue(), free_port()
    for rank in range(2):
        context.Process(target=leave_before_the_last_barrier, args=(tmp_path, rank, port, answers)).start()
    assert answers.get(timeout=60) == "ended well"


@pytest.mark.parametrize(
    ("device", "local_rank"),
    [(torch.device("cpu"), "3"), (torch.device("cuda", 3), "3"), (torch.device("cuda", 0), "0")],
)
def test_deepspeed_finds_the_gpu_of_a_rank_that_sees_only_its_own(device, local_rank):
    """It takes LOCAL_RANK for the GPU's number, and under Open MPI asserts that Open MPI's own variable says the same."""
    ranks = Ranks(
        rank=7, local_rank=3, world_size=8, local_size=4, launcher="srun", master_address="n1", master_port=29500
    )
    variables = variables_for_deepspeed(ranks, device, {"OMPI_COMM_WORLD_LOCAL_RANK": "3"})
    assert variables["LOCAL_RANK"] == variables["OMPI_COMM_WORLD_LOCAL_RANK"] == local_rank
    assert "OMPI_COMM_WORLD_LOCAL_RANK" not in variables_for_deepspeed(ranks, device, {})
    assert (variables["RANK"], variables["WORLD_SIZE"], variables["MASTER_PORT"]) == ("7", "8", "29500")


def make_a_group_with_a_rank_that_does_not_come(world: World) -> float:
    """As DeepSpeed makes groups: without a time-out."""
    if world.rank == 1:
        time.sleep(8)
        os._exit(0)
    began = time.monotonic()
    with pytest.raises((RuntimeError, dist.DistError)):
        dist.all_reduce(torch.zeros(1), group=dist.new_group([0, 1]))
    return time.monotonic() - began


def bounded(rank: int, port: int, answers) -> None:
    local = Ranks(rank=rank, local_rank=rank, world_size=2, local_size=2, launcher="test",
                  master_address="127.0.0.1", master_port=port)  # fmt: skip
    with process_group(local, torch.device("cpu"), timeout=timedelta(seconds=3)) as world:
        answers.put(make_a_group_with_a_rank_that_does_not_come(world))


@pytest.mark.slow
def test_a_group_without_a_time_out_gets_that_of_the_run():
    answers, port = context.Queue(), free_port()
    for rank in range(2):
        context.Process(target=bounded, args=(rank, port, answers)).start()
    assert answers.get(timeout=60) < 7
