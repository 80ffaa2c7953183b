"""Finds this process's rank in the variables of whichever launcher started it. Needs neither torch nor a network."""

import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from dsllm.engine.processes.launcher_variables import (
    WITHOUT_A_SIZE,
    Claim,
    claim_by_hand,
    claim_of_srun,
    claims_of_mpi,
    first_host,
    number,
    refuse_unknown_launchers,
    text,
)
from dsllm.errors import LaunchError, MissingExtra, require
from dsllm.processes import free_port

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Where this process stands in the job."""

    rank: int
    """Number of this process, over all hosts."""
    local_rank: int
    """Number of this process on its host."""
    world_size: int
    """Processes of the job."""
    local_size: int
    """Processes of the job on this host."""
    launcher: str
    """Who started the processes: python, deepspeed, torchrun, srun, mpirun (Open MPI), mpiexec (MPICH, Intel MPI),
    mpirun of MVAPICH, or environment."""
    master_address: str
    """Host of rank 0."""
    master_port: int
    """Port of rank 0's store."""


def discover_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Rank and world size as the launcher gave them; a plain `python` start is a job of one.

    Where launchers are nested, the innermost one counts: torchrun and deepspeed, variables set by hand, MPI, srun.

    Raises:
        LaunchError: the variables are incomplete, no numbers, or contradict each other; a launcher's hostfile does not exist;
            or a launcher has started this process that we cannot read. Without this each process could take itself for the
            only one.
    """
    claim = _innermost(environment)
    if claim is None or (claim.launcher == "srun" and claim.size == 1):
        return _alone(environment, "python", claim)
    if claim.launcher in ("deepspeed", "environment", "torchrun"):
        _refuse_missing_hostfile(claim.launcher)
    if claim.size == 1:
        return _alone(environment, claim.launcher, claim)
    local_rank, local_size = _on_this_host(environment, claim)
    address, port = _rank_0(environment, claim, one_host=local_size == claim.size)
    return Ranks(
        rank=claim.rank,
        local_rank=local_rank,
        world_size=claim.size,
        local_size=local_size,
        launcher=claim.launcher,
        master_address=address,
        master_port=port,
    )


def _innermost(env: Mapping[str, str]) -> Claim | None:
    """The claim that counts; None where no launcher has started this process.

    Raises:
        LaunchError: two claims cannot both be true.
    """
    own, mpi, srun = claim_by_hand(env), claims_of_mpi(env), claim_of_srun(env)
    for claim in mpi:
        if not claim.agrees_with(mpi[0]):
            raise _contradiction(claim, mpi[0])
        if srun is not None and srun.size > claim.size:
            raise _contradiction(claim, srun)  # MPI may start several processes in each task of srun, but not fewer
    outer = [*mpi, *([srun] if srun else [])]
    if own is not None:
        nested = own.launcher in ("torchrun", "deepspeed")  # it has just set these variables itself
        for claim in outer:
            if not nested and (claim.size > own.size or (claim.size == own.size and claim.rank != own.rank)):
                raise _contradiction(own, claim)
        return own
    if not outer:
        refuse_unknown_launchers(env)
        return None
    # srun speaks PMI too, and knows more
    if srun is not None and mpi and mpi[0].local_rank is None and srun.agrees_with(mpi[0]):
        return srun
    return outer[0]


def _contradiction(claim: Claim, other: Claim) -> LaunchError:
    return LaunchError(
        f"the environment says {claim}, but also {other}: one of them comes from another launcher or was set by hand. "
        f"Unset {claim.names.rank} and {claim.names.size}, or {other.names.rank} and {other.names.size}"
        + (" and SLURM_STEP_ID" if "srun" in (claim.launcher, other.launcher) else "")
    )


def _alone(env: Mapping[str, str], launcher: str, claim: Claim | None) -> Ranks:
    """The only process of a job."""
    for name in WITHOUT_A_SIZE:
        if name != "TORCHELASTIC_RUN_ID" and (value := number(env, name)):
            raise LaunchError(f"{name}={value} says that this is not the only process, but {claim}: unset one of them")
    if claim is not None and (claim.local_rank or 0) > 0:
        raise LaunchError(f"local rank {claim.local_rank} is not within the 1 processes of this host ({claim})")
    given = launcher == "torchrun"  # its store is open already; else what is set may be of another job
    return Ranks(
        rank=0,
        local_rank=0,
        world_size=1,
        local_size=1,
        launcher=launcher,
        master_address=(given and text(env, "MASTER_ADDR")) or LOOPBACK,
        master_port=(given and _port(env)) or free_port(),
    )


def _on_this_host(env: Mapping[str, str], claim: Claim) -> tuple[int, int]:
    """Local rank and local size.

    Raises:
        LaunchError: the launcher does not say them: the wrong GPU, or a part of the cores, would be used without a word.
    """
    others = [other for other in (claim, *claims_of_mpi(env), claim_of_srun(env)) if other and other.agrees_with(claim)]
    local_rank = next((other.local_rank for other in others if other.local_rank is not None), None)
    local_size = next((other.local_size for other in others if other.local_size is not None), None)
    for value, names in ((local_rank, claim.names.local_rank), (local_size, claim.names.local_size)):
        if value is None:
            raise LaunchError(
                f"{names[0]} is not set, though {claim} are ({claim.launcher}): only the launcher knows how many of these "
                "processes run on this host. Start through torchrun, deepspeed, srun or mpirun, or set "
                "RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE for each process"
            )
    assert local_rank is not None and local_size is not None, "checked above"
    if local_rank >= local_size:
        raise LaunchError(f"local rank {local_rank} is not within the {local_size} processes of this host ({claim})")
    return local_rank, local_size


def _rank_0(env: Mapping[str, str], claim: Claim, one_host: bool) -> tuple[str, int]:
    """Address and port of rank 0's store."""
    address, port = text(env, "MASTER_ADDR"), _port(env)
    if claim.launcher == "srun":
        # the numbers of job and step keep two of them on one node apart
        job, step = number(env, "SLURM_JOB_ID") or 0, number(env, "SLURM_STEP_ID") or 0
        return address or _first_node(env, one_host), port or 20000 + (job + 101 * step) % 10000
    if claim.launcher in ("deepspeed", "environment", "torchrun"):
        if address is None and not one_host:
            raise LaunchError(
                f"MASTER_ADDR is not set, though {claim} are, on several hosts: set it to the address of rank 0's host"
            )
        return address or LOOPBACK, port or 29500
    if address is None or port is None:
        # only MPI itself can send the others the address at which rank 0 listens
        own = (address or (LOOPBACK if one_host else own_address()), port or free_port())
        address, port = _from_rank_0(claim, own)
        if address is None:
            raise LaunchError(
                f"rank 0 of {claim.size} does not know the address at which other hosts reach it: its host's name means a "
                "loopback address there, and it has no network interface or several; set MASTER_ADDR, for example "
                "mpirun -x MASTER_ADDR=HOST"
            )
    return address, port


def _from_rank_0(claim: Claim, own: tuple[str | None, int]) -> tuple[str | None, int]:
    """Rank 0's address and port, through MPI. A collective call."""
    advice = "set MASTER_ADDR and MASTER_PORT for all ranks, for example mpiexec -genv MASTER_ADDR HOST -genv MASTER_PORT 29500"
    try:
        mpi = require("mpi4py.MPI", "mpi")
    except MissingExtra as error:
        raise MissingExtra(f"{error}; or {advice}") from None
    world = mpi.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (claim.rank, claim.size):
        raise LaunchError(
            f"the launcher says {claim}, but mpi4py finds rank {world.Get_rank()} of {world.Get_size()}: it belongs to "
            f"another MPI than the {claim.launcher} that has started these processes. Use that MPI's own, or {advice}"
        )
    address, port = world.bcast(own, root=0)
    mpi.Finalize()  # not needed any more, and mpirun takes a rank that leaves without it for a failed one
    return address, int(port)


def own_address(host: str | None = None, addresses: Sequence[str] | None = None) -> str | None:
    """The address at which other hosts reach this one: what its name means, or that of its only network interface.

    None: its name means a loopback address (as Debian sets it up), and the interfaces have no address or several.

    Args:
        host: None (default): this host's name.
        addresses: of its network interfaces. None (default): as they are.
    """
    try:
        named = socket.gethostbyname(host or socket.gethostname())
    except OSError:
        named = LOOPBACK
    if not is_loopback(named):
        return named
    if addresses is None:
        up = {name for name, state in psutil.net_if_stats().items() if state.isup}
        of_all = psutil.net_if_addrs().items()
        addresses = [a.address for name, of_one in of_all if name in up for a in of_one if a.family == socket.AF_INET]
    reachable = [address for address in addresses if not is_loopback(address)]
    return reachable[0] if len(reachable) == 1 else None


def is_loopback(address: str) -> bool:
    """Whether an address means every machine itself, so that no other one reaches it."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name
        return False


def _first_node(env: Mapping[str, str], one_host: bool) -> str:
    """The node of rank 0, as srun numbers its tasks."""
    if one_host:
        return LOOPBACK
    nodes = text(env, "SLURM_STEP_NODELIST")
    first = first_host(nodes) if nodes and not (text(env, "SLURM_DISTRIBUTION") or "").startswith("arbitrary") else None
    if first is None:
        raise LaunchError(
            "started by srun, but MASTER_ADDR is not set: the batch script must export the address of the first node"
        )
    return first


def _port(env: Mapping[str, str]) -> int | None:
    port = number(env, "MASTER_PORT")
    if port is not None and not 1 <= port <= 65535:
        raise LaunchError(f"MASTER_PORT={port} is not a port: use a number from 1 to 65535")
    return port


def _refuse_missing_hostfile(launcher: str) -> None:
    """`deepspeed --hostfile MISSING` only warns, and runs the job on this machine alone: find that call and refuse."""
    if launcher != "deepspeed":
        return
    for process in psutil.Process().parents():
        try:
            words, folder = process.cmdline(), process.cwd()
        except psutil.Error:
            continue
        if not any(Path(word).name in ("deepspeed", "ds") for word in words[:2]):
            continue
        for i, word in enumerate(words):
            name = word.partition("=")[2] if word.startswith(("--hostfile=", "-H=")) else None
            if word in ("--hostfile", "-H") and i + 1 < len(words):
                name = words[i + 1]
            if name and not (Path(folder) / name).is_file():
                raise LaunchError(
                    f"--hostfile {name}: no such file; deepspeed would run the job on this machine alone. "
                    "Give the right path, or leave --hostfile out for a local run"
                )
