"""Rendezvous: every rank joins exactly once, with the same world size and mesh; names the rank that does not."""

import errno
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore, rendezvous  # type: ignore[attr-defined]

from dsllm.engine.processes.ranks import Ranks, is_loopback
from dsllm.errors import Interrupted, LaunchError
from dsllm.mesh import Mesh

_LOOK_AGAIN_SECONDS = 0.02
_CONNECT_SECONDS = 2.0
_BACKLOG = 4096
_STOP_SECONDS = 30.0
"""How long a rank that was asked to stop waits for the others, so that they need not wait for it until their time-out."""
_STOP, _OUTCOME = "stop", "outcome"


def meet(
    ranks: Ranks, mesh: Mesh, timeout: timedelta, gpu: str | None = None, why_stop: Callable[[], str] = lambda: ""
) -> Store:
    """Wait for all ranks; returns the store through which they talk.

    Args:
        gpu: this rank's GPU by a name that no other GPU has. None (default): it computes on the CPU.
        why_stop: why this rank was asked to stop; empty: it was not

    Raises:
        LaunchError: rank 0 cannot be reached, ranks are missing, a number or a GPU is taken twice, or world sizes or meshes
            differ.
        Interrupted: a rank was asked to stop before all had met.
    """
    store = _store(ranks, timeout, why_stop)
    try:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives an attempt
        roll = PrefixStore(f"dsllm/{attempt}", store)
        _join(roll, ranks, mesh, gpu)
        _wait_for_all(roll, ranks, timeout, why_stop)
    except RuntimeError as error:
        raise LaunchError(
            f"rank {ranks.rank} of {ranks.world_size} lost rank 0 while the ranks were joining (started by "
            f"{ranks.launcher}): its log says why ({str(error).splitlines()[0]})"
        ) from error
    return store


def _join(roll: Store, ranks: Ranks, mesh: Mesh, gpu: str | None) -> None:
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


def _store(ranks: Ranks, timeout: timedelta, why_stop: Callable[[], str]) -> Store:
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
        if ranks.rank == 0:
            return _open_store(ranks, timeout)
        left = _until_it_listens(ranks, timeout, why_stop)
        return TCPStore(ranks.master_address, ranks.master_port, timeout=left, wait_for_workers=False)
    except (RuntimeError, ValueError, OSError) as error:
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


def _open_store(ranks: Ranks, timeout: timedelta) -> Store:
    """The store of rank 0. It listens on the loopback alone where all ranks are on this machine: it has no password."""
    address, port = ranks.master_address, ranks.master_port
    if not is_loopback(ranks.master_address):
        return TCPStore(address, port, is_master=True, timeout=timeout, wait_for_workers=False)
    families = [family for family, *_ in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)]
    family = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or ranks.launcher != "python":
                raise
            listener.bind((address, 0))  # nobody else knows the port that dsllm chose for a process by itself
            os.environ["MASTER_PORT"] = str(port := listener.getsockname()[1])
        listener.listen(_BACKLOG)
        return TCPStore(
            address, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def _until_it_listens(ranks: Ranks, timeout: timedelta, why_stop: Callable[[], str]) -> timedelta:
    """Wait until rank 0's store can be reached; the time that is left. TCPStore itself would not look for signals.

    Raises:
        OSError: it cannot be reached within the time-out.
        Interrupted: this rank was asked to stop, and rank 0 has not come since.
    """
    deadline, reason = time.monotonic() + timeout.total_seconds(), ""
    while True:
        left = max(0.1, deadline - time.monotonic())
        problem = _try_to_connect(ranks, min(left, _CONNECT_SECONDS))
        if problem is None:
            return timedelta(seconds=max(1.0, left))
        if deadline - time.monotonic() <= 0.1:
            raise Interrupted(reason) if reason else problem
        if not reason and (reason := why_stop()):
            deadline = min(deadline, time.monotonic() + _STOP_SECONDS)
        time.sleep(0.1)


def _try_to_connect(ranks: Ranks, seconds: float) -> OSError | None:
    try:
        socket.create_connection((ranks.master_address, ranks.master_port), seconds).close()
    except OSError as error:
        return error
    return None


def _wait_for_all(roll: Store, ranks: Ranks, timeout: timedelta, why_stop: Callable[[], str]) -> None:
    """Wait until all ranks have joined, and start or stop as rank 0 says: ranks that decided alone would miss each other."""
    deadline = time.monotonic() + timeout.total_seconds()
    missing = list(range(ranks.world_size))
    reason = ""
    while not roll.check([_OUTCOME]):
        missing = [rank for rank in missing if not roll.check([f"rank {rank}"])]
        if not reason and (reason := why_stop()):
            roll.set(_STOP, reason)
            deadline = min(deadline, time.monotonic() + _STOP_SECONDS)
        late = time.monotonic() > deadline
        if ranks.rank == 0 and (not missing or (late and reason)):
            roll.set(_OUTCOME, _STOP if roll.check([_STOP]) else "start")
        elif missing and late:
            if reason:
                raise Interrupted(reason)
            raise LaunchError(
                f"rank {ranks.rank}: of {ranks.world_size} ranks {', '.join(map(str, missing))} did not join within "
                f"{timeout.total_seconds():g} s (started by {ranks.launcher}): the logs of their hosts say why"
            )
        else:
            time.sleep(_LOOK_AGAIN_SECONDS)
    if roll.get(_OUTCOME).decode() == _STOP:
        num_left = roll.add("left", 1)
        deadline = time.monotonic() + _CONNECT_SECONDS
        while ranks.rank == 0 and num_left < ranks.world_size - len(missing) and time.monotonic() < deadline:
            time.sleep(_LOOK_AGAIN_SECONDS)  # the others read the outcome from its store
            num_left = roll.add("left", 0)
        raise Interrupted(reason or "another rank was asked to stop")
