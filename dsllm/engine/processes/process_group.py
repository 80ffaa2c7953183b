"""The process group: start and stop it, with bounded time-outs on every group, and the few collectives a run needs."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dsllm.engine.deepspeed_library import deepspeed
from dsllm.engine.processes.ranks import Ranks
from dsllm.engine.processes.rendezvous import meet
from dsllm.errors import LaunchError

TIMEOUT = timedelta(minutes=30)
"""Longest wait for another rank where the run does not say otherwise."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of the job, once they can talk to each other."""

    ranks: Ranks
    device: torch.device
    timeout: timedelta = TIMEOUT
    """Longest wait for another rank, in every group."""

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.ranks.rank

    @property
    def size(self) -> int:
        """Number of processes; all of them data-parallel."""
        return self.ranks.world_size

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in fp64: exact for whole numbers below 2^53."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum([0.0])


@contextlib.contextmanager
def process_group(ranks: Ranks, device: torch.device, timeout: timedelta = TIMEOUT) -> Iterator[World]:
    """The process group for the duration of a run.

    Raises:
        LaunchError: the other ranks did not come within the time-out.
    """
    os.environ |= {  # DeepSpeed looks for its rank only here
        "RANK": str(ranks.rank),
        "LOCAL_RANK": str(ranks.local_rank),
        "WORLD_SIZE": str(ranks.world_size),
        "MASTER_ADDR": ranks.master_address,
        "MASTER_PORT": str(ranks.master_port),
    }
    backend = "gloo" if device.type == "cpu" else "nccl"
    store = meet(ranks, timeout)
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise LaunchError(
            f"rank {ranks.rank} of {ranks.world_size} cannot join the others at {ranks.master_address}:{ranks.master_port} "
            f"(started by {ranks.launcher}): {error}"
        ) from error
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    world = World(ranks=ranks, device=device, timeout=timeout)
    try:
        yield world
        world.barrier()  # nobody takes its sockets away while another rank still talks
    finally:
        dist.destroy_process_group()  # without this a rank can die at interpreter exit after a run that went well


@contextlib.contextmanager
def lost_ranks_named(
    world: World,
    setting: str = "train.timeout_minutes",
    advice: str = "the same command goes on from the last checkpoint",
) -> Iterator[None]:
    """Say in words that another rank does not answer, in place of the transport's own error.

    Args:
        setting: what the time-out is called where the user sets it.

    Raises:
        LaunchError: another rank has failed or left, or its host cannot be reached any more.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo has no error class of its own; its messages begin with the source file that raised them
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        raise LaunchError(
            f"rank {world.rank} of {world.size} lost another rank: it failed (then its own words are in the log), was killed, "
            f"its host is gone, or it hung for {setting}={world.timeout.total_seconds() / 60:g}; {advice} "
            f"({str(error).splitlines()[0]})"
        ) from error


def own_groups() -> list[dist.ProcessGroup]:
    """All groups that this rank belongs to, DeepSpeed's own among them, in the order in which they were made."""
    return list(distributed_c10d._world.pg_map)


def bound_all_groups(timeout: timedelta) -> None:
    """Give every group the same time-out: DeepSpeed makes groups of its own and gives them torch's default."""
    for group in own_groups():
        distributed_c10d._set_pg_timeout(timeout, group)
