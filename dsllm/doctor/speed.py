"""How fast each rank computes while all compute, and what the ranks send each other: measured on all at once, and judged."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from dsllm.doctor.findings import Finding, Place, where
from dsllm.engine.instruments.bandwidth import CollectiveTime
from dsllm.engine.processes.device import GEMM_FLOPS, gemm_seconds
from dsllm.engine.processes.process_group import World

SLOW_SHARE = 0.8
"""Of the middle rank's speed: every step waits for the slowest rank."""
VERY_SLOW_SHARE = 0.5
SLOW_GPU_NETWORK = 1e9
"""Bytes a second on each rank's wire under which GPUs of several hosts surely do not use their fast network."""

NUM_PRODUCTS = 20
Products = Callable[[torch.device, torch.dtype, int], list[float]]


def measure_gemm(world: World, dtype: torch.dtype, products: Products = gemm_seconds) -> list[float]:
    """FLOP/s of each rank, the median over some matrix products, while all ranks compute; a collective call."""
    world.barrier()
    seconds = statistics.median(products(world.device, dtype, NUM_PRODUCTS))
    return world.gather(GEMM_FLOPS[world.device.type] / seconds)


def check_gemm(rates: Mapping[Place, float]) -> Iterator[Finding]:
    """Ranks that compute slower than the others.

    Args:
        rates: FLOP/s of each rank, while all computed.
    """
    middle = statistics.median_high(rates.values())  # of two ranks the faster one is the measure
    for place, rate in rates.items():
        if rate < SLOW_SHARE * middle:
            yield Finding(
                level="error" if rate < VERY_SLOW_SHARE * middle else "advice",
                check="compute",
                where=where([place]),
                problem=f"{rate / 1e9:,.0f} GFLOP/s in matrix products, {rate / middle:.0%} of the middle rank: all wait",
                action="look for other work there (top, nvidia-smi), heat, power limits, or fewer cores than the others have",
            )


def check_collectives(times: Sequence[CollectiveTime], num_hosts: int, device: str) -> Iterator[Finding]:
    """A network that is far too slow for what it joins."""
    best = max((time.bus_bytes_per_second for time in times if time.operation == "all-reduce"), default=0.0)
    if device == "cuda" and num_hosts > 1 and 0 < best < SLOW_GPU_NETWORK:
        yield Finding(
            level="advice",
            check="collectives",
            where="between the hosts",
            problem=f"all-reduce reaches {best / 1e9:.2f} GB/s: NCCL probably uses a slow interface",
            action="NCCL_DEBUG=INFO tells which one; NCCL_SOCKET_IFNAME or NCCL_IB_HCA chooses another",
        )
