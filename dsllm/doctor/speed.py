"""How fast each rank computes while all ranks compute, and whether the network between them is far too slow."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from dsllm.doctor.findings import Finding, Place, advice_if, below, check, where
from dsllm.engine.instruments.bandwidth import CollectiveTime
from dsllm.engine.processes.device import GEMM_FLOPS, gemm_seconds
from dsllm.engine.processes.process_group import World

SLOW_GPU_NETWORK = 1e9
"""Bytes per second on each rank's wire; below this, GPUs on several hosts surely do not use their fast network."""

NUM_PRODUCTS = 20
Products = Callable[[torch.device, torch.dtype, int], list[float]]


def measure_gemm(world: World, dtype: torch.dtype, products: Products = gemm_seconds) -> list[float]:
    """FLOP/s of each rank, the median over some matrix products, while all ranks compute. A collective call."""
    world.barrier()
    seconds = statistics.median(products(world.device, dtype, NUM_PRODUCTS))
    return world.gather(GEMM_FLOPS[world.device.type] / seconds)


# fmt: off
# One row per check: name, where, level, problem, action.
def check_gemm(rates: Mapping[Place, float]) -> Iterator[Finding]:
    """Find ranks that compute slower than the others.

    Args:
        rates: FLOP/s of each rank, while all ranks computed.
    """
    median = statistics.median_high(rates.values())  # of two ranks the faster one
    for place, rate in rates.items():
        share = rate / median
        yield from check("compute", where([place]), below(share, error=0.5, advice=0.8),
            f"{rate / 1e9:,.0f} GFLOP/s in matrix products, {share:.0%} of the median rank: all ranks wait for this one",
            "look for other programs there (top, nvidia-smi), heat, power limits, or fewer cores than the others have")


def check_collectives(times: Sequence[CollectiveTime], num_hosts: int, device: str) -> Iterator[Finding]:
    """Find GPUs on several hosts whose all-reduce does not reach the speed of any fast network."""
    best = max((time.bus_bytes_per_second for time in times if time.operation == "all-reduce"), default=0.0)
    slow = device == "cuda" and num_hosts > 1 and 0 < best < SLOW_GPU_NETWORK
    yield from check("collectives", "between the hosts", advice_if(slow),
        f"all-reduce reaches {best / 1e9:.2f} GB/s: NCCL probably uses a slow interface",
        "NCCL_DEBUG=INFO shows which one; NCCL_SOCKET_IFNAME or NCCL_IB_HCA chooses another")
