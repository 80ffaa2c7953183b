"""The host under a rank: cores and threads, NUMA, memory, limits, /dev/shm; and what of it will stand in a run's way."""

import os
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from dsllm.byte_units import GIB
from dsllm.doctor.findings import Finding, Place, one_per_host, where
from dsllm.engine.processes.cores import as_list, cores_by_node
from dsllm.processes import cpu_quota, own_cores

UNLIMITED = 2**60
SHM_BYTES_FOR_NCCL = 2**30
"""NCCL's ranks of one host talk through /dev/shm; 64 MiB, a container's default, is too little for them."""
FILES_AT_START = 512
"""Files, sockets and pipes that torch, DeepSpeed, TensorBoard and the shards keep open, whatever the number of ranks."""
FILES_PER_RANK = 16
"""Sockets to each other rank: a full mesh per process group, of which there are about four, some with two ends."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one rank may use of its host. Memory in bytes."""

    cores: tuple[int, ...]
    """Numbers of the cores that this process may run on."""
    quota_cores: float | None
    """CPU time per second that the control group allows; None: no limit."""
    threads: int
    """Threads of torch's own; 0: not known."""
    omp_num_threads: str
    """The variable as the launcher left it; empty: not set."""
    numa_nodes: tuple[int, ...]
    """Memory nodes that those cores belong to."""
    memory_total: int
    memory_available: int
    memory_limit: int | None
    """What the control group allows; None: no limit."""
    open_files: int
    """Soft limit on open files."""
    open_files_hard: int
    locked_memory: int
    """Soft limit on memory that may be locked, as InfiniBand needs it."""
    shm_total: int
    """Size of /dev/shm; 0: there is none."""
    shm_free: int


def look_at_machine(threads: int = 0, root: Path = Path("/")) -> Machine:
    """This process's share of its host.

    Args:
        threads: as torch counts them; 0 where it cannot be asked.
        root: where /proc and /sys lie.
    """
    memory = psutil.virtual_memory()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    cores = own_cores()
    shm = root / "dev" / "shm"
    space = os.statvfs(shm) if shm.is_dir() else None
    return Machine(
        cores=cores,
        quota_cores=cpu_quota(root),
        threads=threads,
        omp_num_threads=os.environ.get("OMP_NUM_THREADS", ""),
        numa_nodes=numa_nodes(cores, root),
        memory_total=memory.total,
        memory_available=memory.available,
        memory_limit=_memory_limit(root, memory.total),
        open_files=_limit(soft),
        open_files_hard=_limit(hard),
        locked_memory=_limit(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]),
        shm_total=space.f_blocks * space.f_frsize if space else 0,
        shm_free=space.f_bavail * space.f_frsize if space else 0,
    )


def _limit(value: int) -> int:
    return UNLIMITED if value == resource.RLIM_INFINITY else value


def numa_nodes(cores: tuple[int, ...], root: Path = Path("/")) -> tuple[int, ...]:
    """Which memory nodes, counted from 0, hold these cores; none where the kernel does not tell."""
    return tuple(number for number, node in enumerate(cores_by_node(root)) if set(cores) & set(node))


def _memory_limit(root: Path, total: int) -> int | None:
    """Bytes that control groups (version 2, then 1) allow; None where that is no less than the host has."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (root / "sys/fs/cgroup" / name).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() and int(text) < total else None
    return None


def check_machines(seen: Mapping[Place, Machine], device: str) -> Iterator[Finding]:
    """What of the hosts will stand in a run's way.

    Args:
        device: "cpu" or "cuda"; NCCL needs more of /dev/shm.
    """
    for place, own in seen.items():
        yield from _judge_limits(place, own, len(seen))
    hosts = one_per_host(seen)
    for place, own in hosts.items():
        ranks = {other: machine for other, machine in seen.items() if other.host == place.host}
        yield from _judge_cores(ranks)
        yield from _judge_memory(place, own)
        if device == "cuda":
            yield from _judge_shm(place, own, len(ranks))


def _judge_limits(place: Place, own: Machine, world_size: int) -> Iterator[Finding]:
    wanted = FILES_AT_START + FILES_PER_RANK * world_size
    if own.open_files < wanted:
        room = (
            ""
            if own.open_files_hard >= wanted
            else f" (the hard limit is {own.open_files_hard}: ask the administrator)"
        )
        yield Finding(
            level="error" if own.open_files < wanted / 2 else "advice",
            check="open files",
            where=where([place]),
            problem=f"at most {own.open_files} files may be open, and {world_size} ranks may need {wanted}",
            action=f"ulimit -n {min(65536, max(own.open_files_hard, wanted))} before the start{room}",
        )


def _judge_cores(ranks: Mapping[Place, Machine]) -> Iterator[Finding]:
    """Threads of all ranks of one host against its cores."""
    cores = sorted({core for own in ranks.values() for core in own.cores})
    first = next(iter(ranks.values()))
    usable = min(len(cores), first.quota_cores or len(cores))
    threads = sum(own.threads for own in ranks.values())
    if threads > usable:
        limit = f" (the control group allows {usable:g})" if usable < len(cores) else ""
        source = f"OMP_NUM_THREADS={first.omp_num_threads}" if first.omp_num_threads else "torch's own choice"
        yield Finding(
            level="advice",
            check="threads",
            where=where(ranks),
            problem=f"{threads} threads in all ({source}) on {len(cores)} cores{limit}: they take turns, and all become slow",
            action=f"OMP_NUM_THREADS={max(1, int(usable // len(ranks)))}, or leave it unset",
        )
    spread = [place for place, own in ranks.items() if len(own.numa_nodes) > 1]
    if spread and len(ranks) > 1:
        yield Finding(
            level="advice",
            check="NUMA",
            where=where(spread),
            problem=f"may run on cores of memory nodes {as_list(ranks[spread[0]].numa_nodes)}; memory of another one is slow",
            action="bind each rank to cores of one node (deepspeed --bind_cores_to_rank, srun --cpu-bind, mpirun --bind-to)",
        )


def _judge_memory(place: Place, own: Machine) -> Iterator[Finding]:
    if own.memory_limit is not None:
        yield Finding(
            level="advice",
            check="memory",
            where=place.host,
            problem=f"the control group allows {own.memory_limit / GIB:.1f} of {own.memory_total / GIB:.1f} GiB",
            action="a run that needs more is killed without a word: raise the container's or the job's limit if it does",
        )
    if own.memory_available < own.memory_total / 4:
        yield Finding(
            level="advice",
            check="memory",
            where=place.host,
            problem=f"only {own.memory_available / GIB:.1f} of {own.memory_total / GIB:.1f} GiB are free",
            action="look who uses it (ps aux --sort -rss | head)",
        )


def _judge_shm(place: Place, own: Machine, num_ranks: int) -> Iterator[Finding]:
    if num_ranks > 1 and own.shm_free < SHM_BYTES_FOR_NCCL:
        yield Finding(
            level="error" if own.shm_free < 64 * 2**20 * num_ranks else "advice",
            check="/dev/shm",
            where=place.host,
            problem=f"{own.shm_free / 2**20:.0f} MiB are free, and NCCL's {num_ranks} ranks of this host talk through it",
            action="give the container more (docker --shm-size 1g; Kubernetes: an emptyDir in memory), or remove old files",
        )
