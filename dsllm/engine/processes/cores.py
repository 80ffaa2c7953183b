"""The cores of this rank: which of the host's cores it has, whether it is bound to them, and how many threads it may start."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsllm.processes import cpu_quota, own_cores


@dataclass(frozen=True)
class Cores:
    """The cores that a rank computes on."""

    numbers: tuple[int, ...]
    """The cores that it may use; where it is not bound, its share of them."""
    bound_by: str
    """"the launcher", "dsllm", or "nobody": then the kernel moves its threads over all cores of the process."""
    num_threads: int
    """Threads that these cores can keep busy: one each, fewer where a control group limits the host's CPU time."""

    def __str__(self) -> str:
        if self.bound_by == "nobody":
            return f"{len(self.numbers)} cores each, not bound"
        return f"cores {as_list(self.numbers)} on rank 0, bound by {self.bound_by}"


def cores_of_rank(local_rank: int, local_size: int, bind: bool | None, root: Path = Path("/")) -> Cores:
    """This rank's cores; binds the process to them if `bind` says so.

    A launcher that binds its ranks (mpirun; srun and deepspeed with an option) leaves each with fewer cores than its
    parent has: these are all the rank's own. Otherwise the local ranks share the cores of the process in the order of
    the memory nodes, so that a rank's cores are on as few nodes as possible.

    Args:
        bind: None (default of a run): where the host has several memory nodes and several ranks, so that a rank's memory
            stays near it. On one node the kernel places threads as well by itself, and a second job would be bound to
            the same cores.
        root: where /proc and /sys are.
    """
    numbers, bound_by = _share(local_rank, local_size, bind, root)
    quota = cpu_quota(root)  # of all local ranks together: they are in one control group
    allowed = len(numbers) if quota is None else int(quota // local_size)
    return Cores(numbers, bound_by, num_threads=max(1, min(len(numbers), allowed)))


def _share(local_rank: int, local_size: int, bind: bool | None, root: Path) -> tuple[tuple[int, ...], str]:
    """The numbers of this rank's cores, and who bound it to them."""
    own = own_cores()
    if set(own) < _affinity_of_parent():
        return own, "the launcher"
    nodes = cores_by_node(root)
    ordered = [core for node in nodes for core in node if core in own] or list(own)
    each = len(ordered) // local_size
    if each == 0:  # more ranks than cores
        return (ordered[local_rank % len(ordered)],), "nobody"
    share = tuple(ordered[local_rank * each : (local_rank + 1) * each])
    if bind is None:
        bind = local_size > 1 and len(nodes) > 1
    if not bind:
        return share, "nobody"
    os.sched_setaffinity(0, share)
    return share, "dsllm"


def cores_by_node(root: Path = Path("/")) -> list[tuple[int, ...]]:
    """The cores of each memory node (NUMA), by the node's number; empty where the kernel does not list them."""
    found = {}
    for node in (root / "sys/devices/system/node").glob("node[0-9]*"):
        listed = (node / "cpulist").read_text(encoding="utf-8").strip()
        found[int(node.name.removeprefix("node"))] = tuple(numbers_in(listed))
    return [found[number] for number in sorted(found)]


def numbers_in(text: str) -> Iterator[int]:
    """The numbers in a list as the kernel writes it: 0-3,8."""
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def as_list(numbers: tuple[int, ...]) -> str:
    """Numbers as the kernel would write them: 0-3,8."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _affinity_of_parent() -> set[int]:
    try:
        return os.sched_getaffinity(os.getppid())
    except (PermissionError, ProcessLookupError):
        return set()
