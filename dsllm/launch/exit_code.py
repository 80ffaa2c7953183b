"""One true exit code of a job: the run's status.json counts for more than what launchers make of their ranks' codes."""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsllm.errors import EXIT_FAILED, EXIT_INTERRUPTED

Status = Mapping[str, Any]
"""status.json of a run; empty before its first attempt."""

HINTS = {
    127: "127: a host sees another file system, or no such program: is shared_directory shared, and Python at this path?",
    255: "255: ssh did not reach a host: try `ssh HOST true`",
}

OVER = ("finished", "interrupted", "failed")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended."""

    code: int
    reason: str


def is_over(before: Status, now: Status) -> bool:
    """Whether the attempt that this job made has ended, by its own word."""
    return _is_new(before, now) and now.get("state") in OVER


def outcome_of(before: Status, after: Status, codes: Sequence[int], stopped_by: signal.Signals | None) -> Outcome:
    """The job's exit code and why.

    Args:
        before, after: the run's status before the start and after the end.
        codes: what the launchers returned, one per host.
        stopped_by: the signal that asked us to stop, if one did.
    """
    said = f"launchers' codes: {', '.join(map(str, codes))}"
    worst = next((code for code in codes if code), 0)
    if not _is_new(before, after):
        if stopped_by:
            return Outcome(code=128 + stopped_by, reason=f"{stopped_by.name} came before the run had begun")
        hint = "".join(f"; {HINTS[code]}" for code in sorted(set(codes) & set(HINTS)))
        return Outcome(code=worst or EXIT_FAILED, reason=f"the run did not begin ({said}{hint})")
    state = after.get("state")
    if state == "finished":
        return Outcome(
            code=0, reason="finished" if not worst else f"finished, though not every rank left well ({said})"
        )
    if state == "interrupted":
        return Outcome(
            code=EXIT_INTERRUPTED, reason=f"saved at step {after.get('step')}; the same command goes on from there"
        )
    if state == "failed":
        return Outcome(code=EXIT_FAILED, reason=f"failed: {after.get('reason')} ({said})")
    if stopped_by:
        return Outcome(code=EXIT_FAILED, reason=f"{stopped_by.name}: ended before it could save ({said})")
    return Outcome(code=EXIT_FAILED, reason=f"rank 0 ended without a word; the same command resumes ({said})")


def _is_new(before: Status, after: Status) -> bool:
    return bool(after.get("attempt", 0) > before.get("attempt", 0))
