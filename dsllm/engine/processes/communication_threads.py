"""Stops gloo's worker threads from starting OpenMP teams, which would oversubscribe the cores."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from dsllm.engine.processes.process_group import World, own_groups

COPIED_ELEMENTS = 2**20
LEAST_COPIED_ELEMENTS = 2**16
"""Least elements per rank: torch copies fewer than 2^15 with one thread anyway."""
COLLECTIVES = 8
"""Collectives in flight at once: enough for each thread of a group (gloo has two) to get one."""


@contextlib.contextmanager
def without_teams(world: World) -> Iterator[None]:
    """Limit the gloo threads of the groups made in the block to one OpenMP thread each, for good.

    libgomp's threads wait for the next parallel section awake, which then starts at once, as long as there are no more of
    them than cores. A thread of gloo's that copies a large tensor makes a team as large as the layers'; from then on all
    go to sleep between any two sections, and waking them took a quarter of a ZeRO-3 step (torch 2.13, two threads). A
    thread takes over the number of threads that torch is set to when it first copies in parallel, and keeps it. So that
    number is one while the groups are made, and until each has copied once.

    A collective call. The number of threads of the caller is what it was, after the block.
    """
    threads = torch.get_num_threads()
    if world.device.type != "cpu" or max(world.gather(threads)) == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
        for group in own_groups():
            _copy_once(group)
    finally:
        torch.set_num_threads(threads)


def _copy_once(group: dist.ProcessGroup) -> None:
    size = dist.get_world_size(group)
    own = torch.zeros(max(LEAST_COPIED_ELEMENTS, COPIED_ELEMENTS // size))
    works = [
        dist.all_gather_into_tensor(own.new_empty(size * len(own)), own, group=group, async_op=True)
        for _ in range(COLLECTIVES)
    ]
    for work in works:
        work.wait()
