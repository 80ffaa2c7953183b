"""Follows a SLURM job from its submission to its end, through requeues: output, signals, state and exit code."""

import contextlib
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsllm.errors import EXIT_FAILED, LaunchError
from dsllm.launch.follow import StopRequest, Waits

_POLL_SECONDS = 2.0
_FORGOTTEN = "FORGOTTEN"
"""Our word for a job that SLURM does not know any more: it forgets a job some minutes after its end."""

_END_STATES = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "PREEMPTED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "REVOKED",
    "LAUNCH_FAILED",
    "RECONFIG_FAIL",
    _FORGOTTEN,
)
"""A job in one of these does not run again; a requeued job is PENDING."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What SLURM reports about a job."""

    state: str
    exit_code: int
    """Exit code of the batch script; 128 plus the signal's number if a signal ended it."""
    reason: str = ""


def submit(command: tuple[str, ...]) -> str:
    """Submit the batch script to SLURM; returns the job's number.

    Raises:
        LaunchError: SLURM is not installed here, or refuses the job; names the reason.
    """
    done = _call(command)
    if done.returncode:
        raise LaunchError(f"sbatch refused the job: {done.stderr.strip()}")
    # a cluster's own sbatch may print more than the number
    numbers = re.findall(r"^([0-9]+)(?:;.*)?$", done.stdout, re.MULTILINE)
    if not numbers:
        raise LaunchError(f"sbatch printed no job number: {(done.stdout + done.stderr).strip()[:200]!r}")
    return str(numbers[-1])


def follow_batch(
    number: str,
    output: Path,
    waits: Waits,
    stop: StopRequest,
    write: Callable[[bytes], None],
) -> JobState:
    """Wait until the job ends, and pass its output on. A request to stop lets the ranks save, and keeps SLURM from
    starting the job again."""
    position, stopping, last_state, deadline, give_up = 0, False, "", float("inf"), float("inf")
    while True:
        now = look(number)
        position = _pass_on(output, position, write)
        if now.state != last_state:
            write(f"job {number}: {now.state} {now.reason}".rstrip().encode() + b"\n")
            last_state = now.state
        if now.state in _END_STATES:
            return now
        if stop.by and not stopping:
            stopping, deadline = True, time.monotonic() + waits.save
            _call(("scontrol", "update", f"JobId={number}", "Requeue=0"))
            # a job that has not begun has nothing to save; SIGUSR1 goes to the ranks, not to the script
            _call(("scancel", number) if now.state == "PENDING" else ("scancel", "--signal=USR1", number))
        if time.monotonic() >= give_up:
            return JobState(
                state=now.state, exit_code=EXIT_FAILED, reason="SLURM does not end the job, or does not answer"
            )
        if time.monotonic() >= deadline:
            deadline, give_up = float("inf"), time.monotonic() + waits.end
            _call(("scancel", number))
        time.sleep(_POLL_SECONDS)


def look(number: str) -> JobState:
    """The job's state now.

    Raises:
        LaunchError: SLURM is not installed here.
    """
    done = _call(("scontrol", "-o", "show", "job", number))
    fields = dict(re.findall(r"\b(JobState|ExitCode|Reason)=(\S+)", done.stdout))
    if done.returncode or "JobState" not in fields:
        if "Invalid job id" in done.stderr:
            return JobState(state=_FORGOTTEN, exit_code=0)
        return JobState(
            state="UNKNOWN", exit_code=0, reason=done.stderr.strip()
        )  # the controller may be down for a while
    code, _, signal_number = fields.get("ExitCode", "0:0").partition(":")
    reason = fields.get("Reason", "None")
    return JobState(
        state=fields["JobState"],
        exit_code=128 + int(signal_number) if int(signal_number or 0) else int(code),
        reason="" if reason == "None" else reason,
    )


def _pass_on(file: Path, position: int, write: Callable[[bytes], None]) -> int:
    """Write what the file contains beyond a position; returns the new position.

    A file that is not there yet, or that a network file system does not give for a moment (ESTALE, EIO), is read later.
    """
    with contextlib.suppress(OSError), file.open("rb") as stream:
        stream.seek(position)
        while data := stream.read(2**20):
            write(data)
            position += len(data)
    return position


def _call(words: tuple[str, ...]) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LaunchError(f"{words[0]}: no such program here: SLURM's commands must be on the PATH") from None
