"""Rendezvous: every rank joins exactly once, with the same world size and mesh; names the rank that does not."""

import os
import socket
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore, rendezvous  # type: ignore[attr-defined]

from dsllm.engine.processes.ranks import Ranks, is_loopback
from dsllm.errors import LaunchError
from dsllm.mesh import Mesh

_LOOK_AGAIN_SECONDS = 0.02


def meet(ranks: Ranks, mesh: Mesh, timeout: timedelta, gpu: str | None = None) -> Store:
    """Wait for all ranks; returns the store through which they talk.

    Args:
        gpu: this rank's GPU by a name that no other GPU has. None (default): it computes on the CPU.

    Raises:
        LaunchError: rank 0 cannot be reached, ranks are missing, a number or a GPU is taken twice, or world sizes or meshes
            differ.
    """
    store = _store(ranks, timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives an attempt
    roll = PrefixStore(f"dsllm/{attempt}", store)
    own = f"process {os.getpid()} on {socket.gethostname()}"
    other = roll.compare_set(f"rank {ranks.rank}", "", own).decode()
    if other != own:
        raise LaunchError(
            f"rank {ranks.rank} of {ranks.world_size} joined twice: {other}, and this is {own} (started by "
            f"{ranks.launcher}): give each process a RANK of its own"
        )
    holder = f"rank {ranks.rank}, {own}"
    if gpu is not None and (other := roll.compare_set(f"gpu {gpu}", "", holder).decode()) != holder:
        raise LaunchError(
            f"rank {ranks.rank} has the GPU {gpu}, which {other}, uses too (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}, started by {ranks.launcher}): at most one rank per GPU"
        )
    size = roll.compare_set("world size", "", str(ranks.world_size)).decode()
    if size != str(ranks.world_size):
        raise LaunchError(
            f"rank {ranks.rank} has a world size of {ranks.world_size}, another rank {size} (started by "
            f"{ranks.launcher}): all processes of a job need the same one"
        )
    agreed = roll.compare_set("mesh", "", repr(mesh)).decode()
    if agreed != repr(mesh):
        raise LaunchError(
            f"rank {ranks.rank} divides the ranks as {mesh!r}, another rank as {agreed}: start every rank with the same "
            "parallel section"
        )
    _wait_for_all(roll, ranks, timeout)
    return store


def _store(ranks: Ranks, timeout: timedelta) -> Store:
    where = f"{ranks.master_address}:{ranks.master_port}"
    try:
        socket.getaddrinfo(ranks.master_address, ranks.master_port)
    except OSError as error:
        raise LaunchError(
            f"rank {ranks.rank} cannot look up the master's address {ranks.master_address} (started by {ranks.launcher}): "
            f"{error}; set MASTER_ADDR to an address that every host knows"
        ) from error
    seconds = timeout.total_seconds()
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agent holds the store
            return next(rendezvous("env://", ranks.rank, ranks.world_size, timeout=timeout))[0]
        address, port, first = ranks.master_address, ranks.master_port, ranks.rank == 0
        return TCPStore(address, port, is_master=first, timeout=timeout, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        cause = str(error).splitlines()[0]
        advice = (
            "is the port taken, by another job or by a second process with rank 0? Set another MASTER_PORT"
            if ranks.rank == 0
            else f"did not answer within {seconds:g} s: is rank 0 running, and is the port open between the hosts?"
        )
        if ranks.rank > 0 and ranks.local_size < ranks.world_size and is_loopback(ranks.master_address):
            advice += (
                f" {ranks.master_address} means every host itself: set MASTER_ADDR to the address of rank 0's host"
            )
        raise LaunchError(
            f"rank {ranks.rank} of {ranks.world_size} cannot open the store of rank 0 at {where} (started by "
            f"{ranks.launcher}): {advice} ({cause})"
        ) from error


def _wait_for_all(roll: Store, ranks: Ranks, timeout: timedelta) -> None:
    deadline = time.monotonic() + timeout.total_seconds()
    missing = list(range(ranks.world_size))
    while missing:
        missing = [rank for rank in missing if not roll.check([f"rank {rank}"])]
        if missing and time.monotonic() > deadline:
            raise LaunchError(
                f"rank {ranks.rank}: of {ranks.world_size} ranks {', '.join(map(str, missing))} did not join within "
                f"{timeout.total_seconds():g} s (started by {ranks.launcher}): the logs of their hosts say why"
            )
        if missing:
            time.sleep(_LOOK_AGAIN_SECONDS)
