"""Finds a job's processes on this machine by the variable that all of them inherit, and ends them."""

import signal
import time
from collections.abc import Sequence

import psutil

from dsllm.launch.job import JOB_VARIABLE

_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK")
_LOOK_AGAIN_SECONDS = 0.1


def processes_of(job: str) -> list[psutil.Process]:
    """The job's processes, without this one and its ancestors."""
    own = {process.pid for process in [psutil.Process(), *psutil.Process().parents()]}
    return [p for p in psutil.process_iter() if p.pid not in own and _variables(p).get(JOB_VARIABLE) == job]


def jobs_on_this_machine(name: str) -> set[str]:
    """The parts of a job, one per host, that have a process on this machine other than this one and its ancestors."""
    own = {process.pid for process in [psutil.Process(), *psutil.Process().parents()]}
    values = {_variables(p).get(JOB_VARIABLE, "") for p in psutil.process_iter() if p.pid not in own}
    return {value for value in values if value.rpartition(".")[0] == name}


def ranks_among(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The ranks: processes with a rank's variables whose parent has none (a rank's own helpers inherit them)."""
    with_rank = {p.pid for p in processes if any(name in _variables(p) for name in _RANK_VARIABLES)}
    return [p for p in processes if p.pid in with_rank and _parent(p) not in with_rank]


def send_signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    """Send a signal to each process that still exists."""
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.Error:
            continue


def end_processes(job: str, wait_seconds: float) -> bool:
    """Ask the job's remaining processes to save and exit, then kill them. Returns True if any were found."""
    found = processes_of(job)
    if not found:
        return False
    send_signal(ranks_among(found) or found, signal.SIGTERM)
    deadline = time.monotonic() + wait_seconds
    while processes_of(job) and time.monotonic() < deadline:
        time.sleep(_LOOK_AGAIN_SECONDS)
    while remaining := processes_of(job):  # more than once: a process may have started another in the meantime
        send_signal(remaining, signal.SIGKILL)
        time.sleep(_LOOK_AGAIN_SECONDS)
    return True


def _variables(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.Error:
        return None
