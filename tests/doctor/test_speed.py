"""A rank that computes slower than the others is measured as slow, and named."""

import time

import pytest
import torch

from dsllm.doctor.speed import check_collectives, check_gemm, measure_gemm
from dsllm.engine.instruments.bandwidth import CollectiveTime
from dsllm.engine.processes.device import gemm_seconds
from tests.doctor.test_findings import places
from tests.helpers.ranks import run_ranks


def rates_on_rank(world, slowdown) -> list[float]:
    def products(device, dtype, repeats):
        """A few real products; on rank 1 each takes `slowdown` times as long in addition."""
        seconds = gemm_seconds(device, dtype, 3)
        if world.rank == 1:
            time.sleep(slowdown * sum(seconds))
            seconds = [(1 + slowdown) * value for value in seconds]
        return seconds

    return measure_gemm(world, torch.float32, products)


def test_a_slow_rank_is_named():
    rates = run_ranks(2, rates_on_rank, 20)
    assert rates[0] == rates[1] and all(rate > 0 for rate in rates[0])
    (found,) = check_gemm(dict(zip(places("a", "b"), rates[0], strict=True)))
    assert found.level == "error" and found.where == "rank 1 on b" and "of the median rank" in found.problem


@pytest.mark.parametrize("share, level", [(0.85, ""), (0.7, "advice"), (0.4, "error")])
def test_how_slow_is_slow(share, level):
    rates = dict(zip(places(*"abcd"), (1e12, 1.02e12, 1e12, share * 1e12), strict=True))
    assert [found.level for found in check_gemm(rates)] == ([level] if level else [])


def test_gpus_of_several_hosts_on_a_slow_network_are_reported():
    slow = CollectiveTime(operation="all-reduce", num_bytes=2**28, seconds=2.0, repeats=5, bus_bytes_per_second=1.2e8)
    assert [found.level for found in check_collectives([slow], 2, "cuda")] == ["advice"]
    assert not list(check_collectives([slow], 1, "cuda")) and not list(check_collectives([slow], 2, "cpu"))
    assert not list(check_collectives([], 1, "cuda"))
