"""Holds a run's directory for one attempt: rank 0 locks it, all ranks see it, and its status says how the attempt ended."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dsllm.engine.processes.process_group import World
from dsllm.run_directory import STATUS_FILE, RunLock, check_shared, lock_run, read_status, refuse_live_run, write_status
from dsllm.session.agreement import on_rank_0


@dataclass(frozen=True)
class HeldDirectory:
    """A run directory that no other run can use."""

    path: Path
    attempt: int
    """Number of this attempt, from 1."""
    world: World
    report: Callable[[str], None]

    def write_status(self, state: str, **facts: object) -> None:
        """Write status.json on rank 0; the other ranks do nothing. A failure is reported, and changes no exit code."""
        if self.world.rank != 0:
            return
        try:
            write_status(self.path, state, attempt=self.attempt, **facts)
        except OSError as error:
            self.report(f"{self.path / STATUS_FILE} was not written ({state}): {error}")


def free_directory_state(path: Path, world: World) -> str:
    """The state in a run's status.json, "" where there is none. Only reads. A collective call.

    Raises:
        RunError: on all ranks: a run is alive there, or its status cannot be read.
    """

    def state() -> str:
        refuse_live_run(path)
        return str(read_status(path).get("state", ""))

    return on_rank_0(world, state)


@contextlib.contextmanager
def held_directory(path: Path, world: World, report: Callable[[str], None]) -> Iterator[HeldDirectory]:
    """Hold a run's directory for the duration of the block; a collective call.

    The status is `running` in the block, and `failed` with the reason if the block raises.

    Raises:
        RunError: on all ranks: a run is alive there, or not every rank sees the directory.
    """
    with _locked(path, world, report):
        check_shared(path, world.rank, world.gather)
        previous = on_rank_0(world, lambda: int(read_status(path).get("attempt", 0)))
        held = HeldDirectory(path, previous + 1, world, report)
        try:
            held.write_status("running")
            yield held
        except BaseException as error:
            held.write_status("failed", reason=f"{type(error).__name__}: {error}")
            raise


@contextlib.contextmanager
def _locked(path: Path, world: World, report: Callable[[str], None]) -> Iterator[None]:
    held: list[RunLock] = []
    try:
        on_rank_0(world, lambda: held.append(lock_run(path, report)))
        yield
    finally:
        for lock in held:
            lock.release()
