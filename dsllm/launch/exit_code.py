"""Derives the job's exit code; status.json takes precedence over the launchers' codes."""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsllm.errors import EXIT_FAILED, EXIT_INTERRUPTED, RunError

Status = Mapping[str, Any]
"""status.json of a run; empty before its first attempt."""

HINTS = {
    127: "127: a host sees another file system, or has no such program: is shared_directory shared, and Python at this path?",
    255: "255: ssh did not reach a host: try `ssh HOST true`",
}

ENDED = ("finished", "interrupted", "failed")
STATUS_PATIENCE_SECONDS = 10.0
_LOOK_AGAIN_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended."""

    code: int
    reason: str


def has_ended(before: Status, read: Callable[[], Status]) -> bool:
    """Whether the status says that this job's attempt has ended.

    Args:
        before: the status before the start.
        read: reads the status now. An error counts as "not yet": on a network file system a file that is being replaced
            may be unreadable for a moment (ESTALE, EIO), and the job must not end because of that.
    """
    try:
        now = read()
    except (RunError, OSError):
        return False
    return _is_new(before, now) and now.get("state") in ENDED


def is_running(before: Status, now: Status) -> bool:
    """Whether the status says that this job's attempt has begun and has not ended."""
    return _is_new(before, now) and now.get("state") not in ENDED


def read_patiently(read: Callable[[], Status], patience_seconds: float = STATUS_PATIENCE_SECONDS) -> Status:
    """The status once the job has ended; tries again for a while if it cannot be read.

    Raises:
        RunError, OSError: of the last try.
    """
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            return read()
        except (RunError, OSError):
            if time.monotonic() >= deadline:
                raise
        time.sleep(_LOOK_AGAIN_SECONDS)


def outcome_of(before: Status, after: Status, codes: Sequence[int], stopped_by: signal.Signals | None) -> Outcome:
    """The job's exit code and the reason for it.

    Args:
        before, after: the run's status before the start and after the end.
        codes: exit codes of the launchers, one per host.
        stopped_by: the signal that stopped it; None: no signal came.
    """
    all_codes = f"launchers' codes: {', '.join(map(str, codes))}"
    first_failure = next((code for code in codes if code), 0)
    if not _is_new(before, after):
        if stopped_by:
            return Outcome(code=128 + stopped_by, reason=f"{stopped_by.name} came before the run had begun")
        if after.get("state") == "finished" and not any(codes):  # nothing to train, so no attempt was counted
            return Outcome(code=0, reason="it was finished before")
        hint = "".join(f"; {HINTS[code]}" for code in sorted(set(codes) & set(HINTS)))
        return Outcome(code=first_failure or EXIT_FAILED, reason=f"the run did not begin ({all_codes}{hint})")
    state = after.get("state")
    if state == "finished":
        note = f", but not every rank ended cleanly ({all_codes})" if first_failure else ""
        return Outcome(code=0, reason=f"finished{note}")
    if state == "interrupted":
        return Outcome(
            code=EXIT_INTERRUPTED, reason=f"saved at step {after.get('step')}; the same command continues from there"
        )
    if state == "failed":
        return Outcome(code=EXIT_FAILED, reason=f"failed: {after.get('reason')} ({all_codes})")
    if stopped_by:
        return Outcome(code=EXIT_FAILED, reason=f"{stopped_by.name}: ended before it could save ({all_codes})")
    return Outcome(
        code=EXIT_FAILED, reason=f"rank 0 ended without writing its status; the same command resumes ({all_codes})"
    )


def _is_new(before: Status, after: Status) -> bool:
    """Whether an attempt has begun between the two."""
    return bool(after.get("attempt", 0) > before.get("attempt", 0))
