"""Collectives between real ranks: every rank gets the same times, for the bytes that were really moved."""

from dsllm.engine.instruments.bandwidth import CollectiveTime, measure_collectives
from tests.helpers.ranks import run_ranks

SIZES = (8, 1000, 2**20)


def times_on_rank(world) -> list[CollectiveTime]:
    return measure_collectives(world, SIZES)


def test_every_rank_sees_the_same_times():
    first, second = run_ranks(2, times_on_rank)
    assert first == second and [own.operation for own in first] == ["all-reduce"] * 3 + ["all-gather"] * 3
    for own in first:
        assert 0 < own.seconds < 60 and own.num_bytes in SIZES
        # of two ranks each sends a whole all-reduce, and half of an all-gather (nccl-tests, PERFORMANCE.md)
        share = 1.0 if own.operation == "all-reduce" else 0.5
        assert own.bus_bytes_per_second == share * own.num_bytes / own.seconds


def test_one_rank_sends_to_no_other():
    assert run_ranks(1, times_on_rank) == [[]]
