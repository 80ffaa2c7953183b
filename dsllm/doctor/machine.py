"""Host problems that would stop or slow a run: cores and threads, NUMA, memory, limits, /dev/shm."""

import os
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from dsllm.byte_units import GIB, MIB
from dsllm.doctor.findings import Finding, Place, advice_if, below, check, one_per_host, where
from dsllm.engine.processes.cores import as_list, cores_by_node
from dsllm.processes import cpu_quota, own_cores

UNLIMITED = 2**60
SHM_BYTES_FOR_NCCL = GIB
SHM_BYTES_PER_RANK = 64 * MIB
"""NCCL's ranks on one host communicate through /dev/shm; 64 MiB, a container's default, is too little for them."""
FILES_AT_START = 512
"""Files, sockets and pipes that torch, DeepSpeed, TensorBoard and the shards keep open, whatever the number of ranks."""
FILES_PER_RANK = 16
"""Sockets to each other rank: a full mesh per process group, about four groups, some with two ends."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one rank may use of its host. Memory in bytes."""

    cores: tuple[int, ...]
    """Numbers of the cores that this process may run on."""
    quota_cores: float | None
    """CPU seconds per second that the control group allows; None: no limit."""
    threads: int
    """Threads that torch uses; 0: unknown."""
    omp_num_threads: str
    """OMP_NUM_THREADS as the launcher left it; empty: not set."""
    numa_nodes: tuple[int, ...]
    """Memory nodes that these cores belong to."""
    memory_total: int
    memory_available: int
    memory_limit: int | None
    """What the control group allows; None: no limit."""
    open_files: int
    """Soft limit on open files."""
    open_files_hard: int
    locked_memory: int
    """Soft limit on locked memory, which InfiniBand needs."""
    shm_total: int
    """Size of /dev/shm; 0: there is none."""
    shm_free: int


def look_at_machine(threads: int = 0, root: Path = Path("/")) -> Machine:
    """This process's share of its host.

    Args:
        threads: as torch counts them; 0: unknown.
        root: where /proc, /sys and /dev are.
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
    """The memory nodes of these cores, counted from 0; empty where the kernel does not list them."""
    return tuple(number for number, node in enumerate(cores_by_node(root)) if set(cores) & set(node))


def _memory_limit(root: Path, total: int) -> int | None:
    """Bytes that control groups (version 2, then 1) allow; None if that is no less than the host has."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (root / "sys/fs/cgroup" / name).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() and int(text) < total else None
    return None


# fmt: off
# One row per check: name, where, level, problem, action.
def check_machines(machines: Mapping[Place, Machine], device: str) -> Iterator[Finding]:
    """Find host problems that would stop or slow a run.

    Args:
        device: "cpu" or "cuda"; NCCL needs more of /dev/shm.
    """
    files = FILES_AT_START + FILES_PER_RANK * len(machines)
    for place, own in machines.items():
        note = "" if own.open_files_hard >= files else f" (the hard limit is {own.open_files_hard}: ask the administrator)"
        yield from check("open files", where([place]), below(own.open_files / files, error=0.5, advice=1.0),
            f"at most {own.open_files} files may be open, and {len(machines)} ranks may need {files}",
            f"ulimit -n {min(65536, max(own.open_files_hard, files))} before the start{note}")
    for first, own in one_per_host(machines).items():
        ranks = {place: machine for place, machine in machines.items() if place.host == first.host}
        yield from _check_cores(ranks, own)
        yield from check("memory", first.host, advice_if(own.memory_limit is not None),
            f"the control group allows {(own.memory_limit or 0) / GIB:.1f} of {own.memory_total / GIB:.1f} GiB",
            "a run that needs more is killed without a message: raise the container's or the job's limit if yours does")
        yield from check("memory", first.host, below(own.memory_available / own.memory_total, advice=0.25),
            f"only {own.memory_available / GIB:.1f} of {own.memory_total / GIB:.1f} GiB are free",
            "find the programs that use it (ps aux --sort -rss | head)")
        small = below(own.shm_free, error=SHM_BYTES_PER_RANK * len(ranks), advice=SHM_BYTES_FOR_NCCL)
        yield from check("/dev/shm", first.host, small if device == "cuda" and len(ranks) > 1 else None,
            f"{own.shm_free / MIB:.0f} MiB are free, and NCCL's {len(ranks)} ranks on this host communicate through it",
            "give the container more (docker --shm-size 1g; Kubernetes: an emptyDir in memory), or remove old files")


def _check_cores(ranks: Mapping[Place, Machine], own: Machine) -> Iterator[Finding]:
    """Threads of all ranks of a host against its cores, and where these cores are."""
    cores = {core for machine in ranks.values() for core in machine.cores}
    usable = min(len(cores), own.quota_cores or len(cores))
    threads = sum(machine.threads for machine in ranks.values())
    source = f"OMP_NUM_THREADS={own.omp_num_threads}" if own.omp_num_threads else "torch's own choice"
    limit = f" (the control group allows {usable:g})" if usable < len(cores) else ""
    yield from check("threads", where(ranks), advice_if(threads > usable),
        f"{threads} threads in all ({source}) on {len(cores)} cores{limit}: they take turns, and all become slow",
        f"OMP_NUM_THREADS={max(1, int(usable // len(ranks)))}, or leave it unset")
    spread = [place for place, machine in ranks.items() if len(machine.numa_nodes) > 1]
    nodes = tuple({node for place in spread for node in ranks[place].numa_nodes})
    yield from check("NUMA", where(spread), advice_if(spread and len(ranks) > 1),
        f"may run on cores of memory nodes {as_list(nodes)}; the memory of another node is slow",
        "bind each rank to cores of one node (deepspeed --bind_cores_to_rank, srun --cpu-bind, mpirun --bind-to)")
