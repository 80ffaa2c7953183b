"""Holds a run's directory for one attempt: rank 0 locks it, all ranks see it, and its status says how the attempt ended."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dsllm.engine.processes.process_group import World
from dsllm.errors import Interrupted, RunError
from dsllm.run_directory import (
    STATUS_FILE,
    RunLock,
    check_shared,
    last_attempt,
    lock_run,
    refuse_live_run,
    status_or_nothing,
    write_status,
)
from dsllm.session.agreement import on_rank_0

_MOST_REASON_CHARACTERS = 2000
"""A status stays so small that it fits into its old place on a full disk."""


@dataclass
class HeldDirectory:
    """A run directory that no other run can use."""

    path: Path
    attempt: int
    """Number of this attempt, from 1."""
    world: World
    report: Callable[[str], None]
    lock: RunLock | None
    """On rank 0 only."""
    saved: dict[str, object]
    """How far the newest checkpoint is: step, tokens, its name. Part of every status."""

    def write_status(self, state: str, **facts: object) -> None:
        """Write status.json on rank 0; the other ranks do nothing. A failure is reported, and changes no exit code.

        Args:
            facts: how far the run is (step, tokens, checkpoint); what is left out stays as it was
        """
        self.saved |= {name: value for name, value in facts.items() if name != "reason"}
        if self.lock is None:
            return
        if not self.lock.is_in_place():  # another run may have the directory now
            self.report(f"{self.path / STATUS_FILE} was not written ({state}): the run's lock is not there any more")
            return
        try:
            write_status(self.path, state, attempt=self.attempt, **(self.saved | facts))
        except OSError as error:
            self.report(f"{self.path / STATUS_FILE} was not written ({state}): {error}")

    def renew(self) -> bool:
        """Take the lock again if somebody has removed it or the directory under the run; whether that was so. Rank 0 only.

        Raises:
            RunError: another run has taken the directory meanwhile; nothing in it was changed.
        """
        assert self.lock is not None, "only rank 0 holds the lock"
        if self.lock.is_in_place():
            return False
        try:
            taken = lock_run(self.path, self.report)
        except RunError as error:
            raise RunError(
                f"the lock of this run was removed while it was alive, and now {error}. This run ends and saves nothing "
                "more, so that the two do not mix"
            ) from error
        self.lock.release()
        self.lock = taken
        self.report(
            f"{self.path}: its lock was removed while the run was alive; it is locked again, and the run continues"
        )
        return True


def free_directory_state(path: Path, world: World, report: Callable[[str], None] = lambda text: None) -> str:
    """The state in a run's status.json, "" where there is none or it is damaged. Only reads. A collective call.

    Raises:
        RunError: on all ranks: a run is alive there, or a newer dsllm wrote its status.
    """

    def state() -> str:
        refuse_live_run(path)
        return str(status_or_nothing(path, report).get("state", ""))

    return on_rank_0(world, state)


@contextlib.contextmanager
def held_directory(path: Path, world: World, report: Callable[[str], None], **saved: object) -> Iterator[HeldDirectory]:
    """Hold a run's directory for the duration of the block; a collective call.

    The status is `running` in the block. If the block raises it becomes `failed` with the reason, or `interrupted`.

    Args:
        saved: how far the run is (step, tokens), for its status

    Raises:
        RunError: on all ranks: a run is alive there, or not every rank sees the directory.
    """
    with _locked(path, world, report) as held:
        held.saved |= saved
        check_shared(path, world.rank, world.gather)
        held.attempt = 1 + on_rank_0(world, lambda: last_attempt(path))
        try:
            held.write_status("running")
            yield held
        except Interrupted as error:
            held.write_status("interrupted", reason=f"{error}, before the first step")
            raise
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            held.write_status("failed", reason=reason[:_MOST_REASON_CHARACTERS])
            raise


@contextlib.contextmanager
def _locked(path: Path, world: World, report: Callable[[str], None]) -> Iterator[HeldDirectory]:
    taken: list[RunLock] = []
    on_rank_0(world, lambda: taken.append(lock_run(path, report)))
    held = HeldDirectory(path, 0, world, report, lock=taken[0] if taken else None, saved={})
    try:
        yield held
    finally:
        if held.lock is not None:
            held.lock.release()
