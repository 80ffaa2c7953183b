"""The cores of this rank: its share of those of the host, and whether it is bound to them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cores:
    """What a rank computes on."""

    numbers: tuple[int, ...]
    """The cores that it may use, or where it is not bound, its share of them."""
    bound_by: str
    """The launcher, dsllm, or nobody: then the kernel moves its threads over all cores of the process."""

    def __str__(self) -> str:
        if self.bound_by == "nobody":
            return f"{len(self.numbers)} cores each, not bound"
        return f"cores {as_list(self.numbers)} on rank 0, bound by {self.bound_by}"


def cores_of_rank(local_rank: int, local_size: int, bind: bool | None, root: Path = Path("/")) -> Cores:
    """This rank's cores; binds the process to them where asked.

    A launcher that binds its ranks (mpirun; srun and deepspeed when told to) leaves each with fewer cores than their
    parent has: these are then all this rank's own. Otherwise the local ranks share what there is, in the order of the
    memory nodes, so that a rank's cores lie on as few of them as possible.

    Args:
        bind: None: where the host has several memory nodes and several ranks, so that a rank's memory stays near it. On
            one node the kernel places threads as well by itself, and a second job would be bound to the same cores
        root: of the file system that describes the host
    """
    own = os.sched_getaffinity(0)
    if own < _affinity_of_parent():
        return Cores(tuple(sorted(own)), "the launcher")
    nodes = cores_by_node(root)
    ordered = [core for node in nodes for core in node if core in own] or sorted(own)
    each = len(ordered) // local_size
    if each == 0:  # more ranks than cores
        return Cores((ordered[local_rank % len(ordered)],), "nobody")
    share = tuple(ordered[local_rank * each : (local_rank + 1) * each])
    if bind is None:
        bind = local_size > 1 and len(nodes) > 1
    if not bind:
        return Cores(share, "nobody")
    os.sched_setaffinity(0, share)
    return Cores(share, "dsllm")


def cores_by_node(root: Path = Path("/")) -> list[tuple[int, ...]]:
    """The cores of each memory node (NUMA), by the node's number; empty where the kernel does not tell."""
    found = {}
    for node in (root / "sys/devices/system/node").glob("node[0-9]*"):
        listed = (node / "cpulist").read_text(encoding="utf-8").strip()
        found[int(node.name.removeprefix("node"))] = tuple(numbers_in(listed))
    return [found[number] for number in sorted(found)]


def numbers_in(text: str) -> Iterator[int]:
    """The kernel's way of writing lists: 0-3,8."""
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def as_list(numbers: tuple[int, ...]) -> str:
    """The other way round: 0-3,8."""
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
