"""Ranks of this machine: values in rank order, errors as text, bounded waiting, nothing left behind."""

import os
import time
from collections.abc import Iterator

import psutil
import pytest

from dsllm.engine.processes.local_ranks import RankError, iterate_on_ranks, run_on_ranks
from dsllm.engine.processes.process_group import World


def rank_and_sum(world: World, offset: int) -> tuple[int, list[float]]:
    return world.rank + offset, world.sum([float(world.rank)])


def test_each_rank_answers_in_order():
    assert run_on_ranks(3, rank_and_sum, 10) == [(10, [3.0]), (11, [3.0]), (12, [3.0])]


def count(world: World, numbers: int) -> Iterator[tuple[int, int]]:
    for number in range(numbers):
        yield world.rank, number


def test_rounds_arrive_together():
    assert list(iterate_on_ranks(2, count, 2)) == [[(0, 0), (1, 0)], [(0, 1), (1, 1)]]


def go_wrong(world: World, how: str) -> Iterator[int]:
    yield os.getpid()
    if world.rank == 1 and how == "raises":
        raise ValueError("a number that nobody wanted")
    if world.rank == 1 and how == "dies":
        os._exit(3)
    if how == "hangs":
        time.sleep(60)
    world.barrier()
    yield 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "rank 1: Traceback(.|\n)*a number that nobody wanted"),
        ("dies", "rank 1: died"),
        ("hangs", "within 2 s"),
    ],
)
def test_what_goes_wrong_is_reported_and_no_process_is_left(how: str, message: str):
    rounds = iterate_on_ranks(2, go_wrong, how, timeout_seconds=20 if how != "hangs" else 2)
    processes = next(rounds)
    with pytest.raises(RankError, match=message):
        next(rounds)
    assert not any(psutil.pid_exists(pid) for pid in processes)


def test_leaving_early_ends_the_ranks():
    rounds = iterate_on_ranks(2, go_wrong, "hangs", timeout_seconds=20)
    processes = next(rounds)
    rounds.close()
    assert not any(psutil.pid_exists(pid) for pid in processes)
