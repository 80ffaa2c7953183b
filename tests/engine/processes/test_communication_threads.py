"""gloo's threads make no teams of threads: there are as many of them after large collectives as before."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dsllm.engine.processes.communication_threads import without_teams
from dsllm.engine.processes.process_group import World, own_groups
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_engine, tiny_run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")


def gloo_threads() -> int:
    """Threads of gloo's, and of teams that they have made: those have the name of their maker."""
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    return names.count("pt_gloo_runloop")


def gather_much() -> None:
    for group in own_groups():
        size = dist.get_world_size(group)
        own = torch.zeros(2**20)
        works = [
            dist.all_gather_into_tensor(torch.empty(size * 2**20), own, group=group, async_op=True) for _ in range(8)
        ]
        for work in works:
            work.wait()


def new_teams(world: World, kept_away: bool) -> int:
    """How many threads large collectives bring into a process that computes with two."""
    torch.set_num_threads(2)
    if kept_away:
        with without_teams(world):
            dist.new_group()
    before = gloo_threads()
    gather_much()
    return gloo_threads() - before


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_teams_are_made(world_size):
    assert run_ranks(world_size, new_teams, True) == [0] * world_size


def test_without_it_they_are():
    """Where this fails, torch no longer makes them, and communication_threads.py can go."""
    assert run_ranks(1, new_teams, False)[0] > 0


def build_and_gather(world: World) -> tuple[int, int]:
    """Threads that come, and the process's own number of threads, with an engine and DeepSpeed's groups."""
    torch.set_num_threads(2)
    tiny_engine(world, tiny_run(), 3)
    before = gloo_threads()
    gather_much()
    return gloo_threads() - before, torch.get_num_threads()


def test_an_engine_s_groups_make_none():
    assert run_ranks(1, build_and_gather) == [(0, 2)]
