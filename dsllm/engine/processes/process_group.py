"""The process group of a job: its mesh and groups, bounded time-outs on every group, and the few collectives a run needs."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dsllm.engine.deepspeed_library import deepspeed
from dsllm.engine.processes.device import gpu_identity
from dsllm.engine.processes.ranks import Ranks, is_loopback
from dsllm.engine.processes.rendezvous import meet
from dsllm.errors import LaunchError
from dsllm.mesh import AXES, Axis, Mesh

TIMEOUT = timedelta(minutes=30)
"""Longest wait for another rank where the run does not say otherwise."""

Over = Literal["world"] | Axis
"""The ranks that a collective covers: all of them, or those that differ along one axis of the mesh."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of the job, once they can talk to each other."""

    ranks: Ranks
    device: torch.device
    mesh: Mesh
    timeout: timedelta = TIMEOUT
    """Longest wait for another rank, in every group."""
    groups: Mapping[Axis, dist.ProcessGroup] = field(default_factory=dict)
    """This rank's group along each axis that is neither 1 nor the whole world."""

    @property
    def rank(self) -> int:
        """Number of this process among all."""
        return self.ranks.rank

    @property
    def size(self) -> int:
        """Number of all processes."""
        return self.ranks.world_size

    @property
    def data_rank(self) -> int:
        """Number of this rank among those that read different samples."""
        return self.mesh.place(self.rank, "data")

    @property
    def data_size(self) -> int:
        """Ranks that read different samples."""
        return self.mesh.data

    @property
    def is_first_reader(self) -> bool:
        """Whether this rank reports for those that read the same samples, because they share a model or a sequence."""
        return all(self.mesh.place(self.rank, axis) == 0 for axis in AXES if axis != "data")

    def sum(self, values: Sequence[float], over: Over = "world") -> list[float]:
        """Sums over ranks, in fp64: exact for whole numbers below 2^53. A collective call."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self._size(over) > 1:
            dist.all_reduce(tensor, group=None if over == "world" else self.groups.get(over))
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order, on every rank. A collective call."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def send_from_rank_0(self, value: Any) -> Any:
        """Rank 0's value, on every rank; what the others pass is ignored. A collective call."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum([0.0])

    def _size(self, over: Over) -> int:
        return self.size if over == "world" else self.mesh.size(over)


@contextlib.contextmanager
def process_group(
    ranks: Ranks,
    device: torch.device,
    mesh: Mesh | None = None,
    timeout: timedelta = TIMEOUT,
    why_stop: Callable[[], str] = lambda: "",
) -> Iterator[World]:
    """The process group for the duration of a run.

    Args:
        mesh: None (default): every rank is data-parallel
        why_stop: why this rank was asked to stop, asked while the ranks meet; empty: it was not

    Raises:
        LaunchError: the other ranks did not come within the time-out, or have another mesh.
        Interrupted: a rank was asked to stop before all had met.
    """
    mesh = mesh or Mesh(data=ranks.world_size)
    assert mesh.world_size == ranks.world_size, f"a mesh of {mesh.world_size} ranks in a world of {ranks.world_size}"
    os.environ |= variables_for_deepspeed(ranks, device, os.environ)
    if is_loopback(ranks.master_address) and "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would listen on the host's address
    backend = "gloo" if device.type == "cpu" else "nccl"
    store = meet(ranks, mesh, timeout, gpu_identity(device), why_stop)
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        dist.barrier()  # a rank that fails at once would close its sockets while others still connect to it
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise LaunchError(
            f"rank {ranks.rank} of {ranks.world_size} cannot join the others at {ranks.master_address}:{ranks.master_port} "
            f"(started by {ranks.launcher}): {error}"
        ) from error
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    groups = _make_groups(mesh, ranks.rank, timeout)
    world = World(ranks=ranks, device=device, mesh=mesh, timeout=timeout, groups=groups)
    try:
        with _default_timeout(timeout):
            yield world
        # no rank closes its sockets while another one still talks; a rank that is lost here changes nothing any more
        with contextlib.suppress(RuntimeError):
            world.barrier()
    finally:
        dist.destroy_process_group()  # without this a rank can crash at interpreter exit after a successful run


@contextlib.contextmanager
def _default_timeout(timeout: timedelta) -> Iterator[None]:
    """Bound the groups that DeepSpeed makes, too: a rank that is lost while one is made would be waited for half an hour."""
    names = ("default_pg_timeout", "default_pg_nccl_timeout")
    before = {name: getattr(distributed_c10d, name) for name in names}
    for name in names:
        setattr(distributed_c10d, name, timeout)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(distributed_c10d, name, value)


def variables_for_deepspeed(ranks: Ranks, device: torch.device, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables in which DeepSpeed looks for its rank and its GPU.

    Args:
        environment: as the launcher has set it
    """
    # DeepSpeed takes the local rank for the number of its GPU: 0 where the launcher shows each rank only its own
    local_rank = str(ranks.local_rank if device.index is None else device.index)
    open_mpi = "OMPI_COMM_WORLD_LOCAL_RANK"
    return {
        "RANK": str(ranks.rank),
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": str(ranks.world_size),
        "MASTER_ADDR": ranks.master_address,
        "MASTER_PORT": str(ranks.master_port),
        **({open_mpi: local_rank} if open_mpi in environment else {}),  # it insists that both are the same
    }


def _make_groups(mesh: Mesh, rank: int, timeout: timedelta) -> dict[Axis, dist.ProcessGroup]:
    """This rank's group along each axis. Every rank makes all groups, in the same order, as torch requires."""
    own: dict[Axis, dist.ProcessGroup] = {}
    for axis in AXES:
        if mesh.size(axis) in (1, mesh.world_size):
            continue  # one rank needs no group, and all ranks have the default one
        for ranks in mesh.groups(axis):
            group = dist.new_group(list(ranks), timeout=timeout)  # new groups do not inherit the time-out
            if rank in ranks:
                own[axis] = group
    return own


@contextlib.contextmanager
def lost_ranks_named(
    world: World,
    setting: str = "train.timeout_minutes",
    advice: str = "the same command continues from the last checkpoint",
) -> Iterator[None]:
    """Turn the transport's error about a lost rank into a LaunchError that says what to do.

    Args:
        setting: the name of the time-out where the user sets it.

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
            f"rank {world.rank} of {world.size} lost another rank: it failed (then the log has its message), was killed, "
            f"its host is gone, or it hung for {setting}={world.timeout.total_seconds() / 60:g}; {advice} "
            f"({str(error).splitlines()[0]})"
        ) from error


def own_groups() -> list[dist.ProcessGroup]:
    """All groups of this rank, DeepSpeed's own included, in the order in which they were made."""
    return list(distributed_c10d._world.pg_map)


def bound_all_groups(timeout: timedelta) -> None:
    """Give every group the same time-out: DeepSpeed makes groups of its own and gives them torch's default."""
    for group in own_groups():
        distributed_c10d._set_pg_timeout(timeout, group)
