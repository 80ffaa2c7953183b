"""Follows a SLURM job from its submission to its end, through requeues: output, signals, its state and exit code."""

import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsllm.errors import LaunchError
from dsllm.launch.follow import StopRequest, Waits

_POLL_SECONDS = 2.0
_FORGOTTEN = "FORGOTTEN"
"""SLURM drops a job some minutes after its end."""

_OVER = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    _FORGOTTEN,
)


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What SLURM says of a job."""

    state: str
    exit_code: int
    """Of the batch script; 128 and the signal's number where a signal ended it."""
    reason: str = ""


def submit(command: tuple[str, ...]) -> str:
    """Hand the script to SLURM; the job's number.

    Raises:
        LaunchError: SLURM is not there, or refuses the job; says why.
    """
    done = _call(command)
    if done.returncode:
        raise LaunchError(f"sbatch refused the job: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def follow_batch(
    number: str,
    output: Path,
    waits: Waits,
    stop: StopRequest,
    write: Callable[[bytes], None],
) -> JobState:
    """Wait for the job's end, passing its output on. A wish to stop lets the ranks save, and keeps SLURM from starting
    the job again."""
    position, stopping, last, deadline = 0, False, "", float("inf")
    while True:
        now = look(number)
        position = _pass_on(output, position, write)
        if now.state != last:
            write(f"job {number}: {now.state} {now.reason}".rstrip().encode() + b"\n")
            last = now.state
        if now.state in _OVER:
            return now
        if stop.by and not stopping:
            stopping, deadline = True, time.monotonic() + waits.save
            _call(("scontrol", "update", f"JobId={number}", "Requeue=0"))
            # a job that has not begun has nothing to save; SIGUSR1 goes to the ranks, not to the script
            _call(("scancel", number) if now.state == "PENDING" else ("scancel", "--signal=USR1", number))
        if time.monotonic() >= deadline:
            deadline = float("inf")
            _call(("scancel", number))
        time.sleep(_POLL_SECONDS)


def look(number: str) -> JobState:
    """The job's state now.

    Raises:
        LaunchError: SLURM is not there.
    """
    done = _call(("scontrol", "-o", "show", "job", number))
    found = dict(re.findall(r"\b(JobState|ExitCode|Reason)=(\S+)", done.stdout))
    if done.returncode or "JobState" not in found:
        if "Invalid job id" in done.stderr:
            return JobState(state=_FORGOTTEN, exit_code=0)
        return JobState(state="UNKNOWN", exit_code=0, reason=done.stderr.strip())  # the controller may be away a while
    code, _, number_of_signal = found.get("ExitCode", "0:0").partition(":")
    reason = found.get("Reason", "None")
    return JobState(
        state=found["JobState"],
        exit_code=128 + int(number_of_signal) if int(number_of_signal or 0) else int(code),
        reason="" if reason == "None" else reason,
    )


def _pass_on(file: Path, position: int, write: Callable[[bytes], None]) -> int:
    """Write what a file has beyond a position; the new position."""
    if not file.is_file():
        return position
    with file.open("rb") as stream:
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
