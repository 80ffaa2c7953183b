"""Finds this process's rank in the variables of whichever launcher started it. Needs neither torch nor a network."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from dsllm.errors import LaunchError, require
from dsllm.processes import free_port


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
    """Who started the processes: python, deepspeed, torchrun, srun, mpirun, or environment."""
    master_address: str
    """Host of rank 0."""
    master_port: int
    """Port of rank 0's store."""


def discover_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Rank and world size as the launcher gave them; a plain `python` start is a job of one.

    Raises:
        LaunchError: the variables contradict each other, or a launcher's hostfile does not exist.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _checked(_from_environment(environment))
    if "OMPI_COMM_WORLD_RANK" in environment:
        return _checked(_from_mpi(environment))
    if (
        "SLURM_PROCID" in environment
        and "SLURM_STEP_ID" in environment
        and int(environment.get("SLURM_NTASKS", "1")) > 1
    ):
        return _checked(_from_slurm(environment))
    return Ranks(
        rank=0,
        local_rank=0,
        world_size=1,
        local_size=1,
        launcher="python",
        master_address="127.0.0.1",
        master_port=free_port(),
    )


def _from_environment(env: Mapping[str, str]) -> Ranks:
    if "TORCHELASTIC_RUN_ID" in env:
        launcher = "torchrun"
    else:
        launcher = "deepspeed" if "CROSS_SIZE" in env else "environment"
        _refuse_missing_hostfile(launcher)
    size = _number(env, "WORLD_SIZE")
    return Ranks(
        rank=_number(env, "RANK"),
        local_rank=_number(env, "LOCAL_RANK", "0" if size == 1 else None),
        world_size=size,
        local_size=_number(env, "LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", str(size))),
        launcher=launcher,
        master_address=env.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number(env, "MASTER_PORT", "29500"),
    )


def _from_slurm(env: Mapping[str, str]) -> Ranks:
    if "MASTER_ADDR" not in env:
        raise LaunchError(
            "started by srun, but MASTER_ADDR is not set: the batch script must export the address of the first node"
        )
    return Ranks(
        rank=_number(env, "SLURM_PROCID"),
        local_rank=_number(env, "SLURM_LOCALID"),
        world_size=_number(env, "SLURM_NTASKS"),
        local_size=int(
            env.get("SLURM_NTASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1")).split("(")[0].split(",")[0]
        ),
        launcher="srun",
        master_address=env["MASTER_ADDR"],
        # the job's number keeps two jobs on one node apart
        master_port=_number(env, "MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 10000)),
    )


def _from_mpi(env: Mapping[str, str]) -> Ranks:
    rank = _number(env, "OMPI_COMM_WORLD_RANK")
    address, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if address is None or port is None:
        # only MPI itself can send the others the address at which rank 0 listens
        own = (socket.gethostbyname(socket.gethostname()), str(free_port()))
        mpi = require("mpi4py.MPI", "mpi")
        address, port = mpi.COMM_WORLD.bcast(own, root=0)
        mpi.Finalize()  # not needed any more, and mpirun takes a rank that leaves without it for a failed one
    return Ranks(
        rank=rank,
        local_rank=_number(env, "OMPI_COMM_WORLD_LOCAL_RANK"),
        world_size=_number(env, "OMPI_COMM_WORLD_SIZE"),
        local_size=_number(env, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        launcher="mpirun",
        master_address=address,
        master_port=int(port),
    )


def _number(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = env.get(name, default)
    if text is None:
        raise LaunchError(
            f"{name} is not set, though other variables of a launcher are; start through one launcher, or set it"
        )
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{name}={text!r} is not a number; it comes from the launcher's environment") from None


def _checked(ranks: Ranks) -> Ranks:
    if not 0 <= ranks.rank < ranks.world_size:
        raise LaunchError(f"rank {ranks.rank} is not within a world of {ranks.world_size}; {ranks.launcher} set both")
    if not 0 <= ranks.local_rank < ranks.local_size:
        raise LaunchError(f"local rank {ranks.local_rank} is not within the {ranks.local_size} processes of this host")
    return ranks


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
