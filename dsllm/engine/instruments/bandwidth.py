"""How long collectives take between the ranks, by size: what a step's communication is made of."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dsllm.engine.processes.device import synchronize
from dsllm.engine.processes.process_group import World

SIZES = {"cpu": (8, 2**16, 2**20, 2**24), "cuda": (8, 2**16, 2**20, 2**24, 2**28)}
"""Bytes, by device: the smallest shows the latency, the largest the bandwidth."""
LEAST_REPEATS, MOST_REPEATS = 5, 50
SECONDS_PER_SIZE = 0.3


@dataclass(frozen=True, kw_only=True)
class CollectiveTime:
    """One collective at one size."""

    operation: str
    num_bytes: int
    """Size of the whole result on one rank."""
    seconds: float
    """Median over repeats; in each, of the slowest rank."""
    repeats: int
    bus_bytes_per_second: float
    """What each rank's wire carries, comparable over numbers of ranks (the bus bandwidth of NVIDIA's nccl-tests)."""


def measure_collectives(world: World, sizes: Sequence[int]) -> list[CollectiveTime]:
    """Time all-reduce and all-gather of fp32 at each size; a collective call. Empty in a world of one rank."""
    if world.size == 1:
        return []
    return [_measure(world, operation, num_bytes) for operation in ("all-reduce", "all-gather") for num_bytes in sizes]


def _measure(world: World, operation: str, num_bytes: int) -> CollectiveTime:
    call, num_bytes = _prepare(world, operation, num_bytes)
    first = [_timed(world, call) for _ in range(2)][1]  # the very first one also makes connections
    slowest = max(world.gather(first))
    repeats = int(min(MOST_REPEATS, max(LEAST_REPEATS, SECONDS_PER_SIZE / slowest)))
    own = [_timed(world, call) for _ in range(repeats)]
    seconds = statistics.median(max(row) for row in zip(*world.gather(own), strict=True))
    wire = (2 if operation == "all-reduce" else 1) * (world.size - 1) / world.size
    return CollectiveTime(
        operation=operation,
        num_bytes=num_bytes,
        seconds=seconds,
        repeats=repeats,
        bus_bytes_per_second=wire * num_bytes / seconds,
    )


def _prepare(world: World, operation: str, num_bytes: int) -> tuple[Callable[[], object], int]:
    """The call, and the bytes that it really moves: whole numbers on every rank."""
    if operation == "all-reduce":
        whole = torch.zeros(max(1, num_bytes // 4), device=world.device)
        return (lambda: dist.all_reduce(whole)), 4 * whole.numel()
    own = torch.zeros(max(1, num_bytes // 4 // world.size), device=world.device)
    parts = [torch.empty_like(own) for _ in range(world.size)]
    return (lambda: dist.all_gather(parts, own)), 4 * own.numel() * world.size


def _timed(world: World, call: Callable[[], object]) -> float:
    world.barrier()
    synchronize(world.device)
    start = time.perf_counter()
    call()
    synchronize(world.device)
    return time.perf_counter() - start
