"""Holds a run's directory for an attempt: locked by rank 0, seen by all ranks, its status true however the attempt ends."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dsllm.engine.processes.process_group import World
from dsllm.errors import RunError
from dsllm.run_directory import RunLock, check_shared, lock_run, read_status, write_status


@dataclass(frozen=True)
class HeldDirectory:
    """A run directory that no other run can use."""

    path: Path
    attempt: int
    """Number of this attempt, from 1."""
    world: World

    def write_status(self, state: str, **facts: object) -> None:
        """Write status.json on rank 0; the other ranks do nothing."""
        if self.world.rank == 0:
            write_status(self.path, state, attempt=self.attempt, **facts)


@contextlib.contextmanager
def held_directory(path: Path, world: World, report: Callable[[str], None]) -> Iterator[HeldDirectory]:
    """Hold a run's directory for the duration of the block; a collective call.

    The status is `running` in the block, and `failed` with the reason if the block raises.

    Raises:
        RunError: on all ranks: a run is alive there, or not every rank sees the directory.
    """
    with _locked(path, world, report):
        check_shared(path, world.rank, world.gather)
        previous = world.send_from_rank_0(int(read_status(path).get("attempt", 0)) if world.rank == 0 else None)
        held = HeldDirectory(path, previous + 1, world)
        try:
            held.write_status("running")
            yield held
        except BaseException as error:
            held.write_status("failed", reason=f"{type(error).__name__}: {error}")
            raise


@contextlib.contextmanager
def _locked(path: Path, world: World, report: Callable[[str], None]) -> Iterator[None]:
    lock: RunLock | None = None
    problem = ""
    if world.rank == 0:
        try:
            lock = lock_run(path, report)
        except RunError as error:
            problem = str(error)
    try:
        problem = world.send_from_rank_0(problem)
        if problem:
            raise RunError(problem)
        yield
    finally:
        if lock is not None:
            lock.release()
