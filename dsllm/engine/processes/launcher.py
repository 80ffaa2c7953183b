"""The processes that started this rank: without them it would keep training as an orphan that no command stops."""

from dataclasses import dataclass, field
from pathlib import Path

import psutil

PROGRAMS = {
    *("deepspeed", "ds", "torchrun", "srun"),
    *("mpirun", "mpiexec", "orterun", "orted", "prted", "prterun"),  # Open MPI
    *("mpiexec.hydra", "hydra_pmi_proxy", "hydra_bstrap_proxy", "mpiexec.gforker"),  # MPICH, Intel MPI
    *("mpirun_rsh", "mpispawn"),  # MVAPICH
}
"""Launchers by their program's name."""

MARKS = ("deepspeed.launcher", "torch.distributed.run", "dsllm.launch.node", "slurmstepd")
"""Launchers without a program of their own, by what their command line contains; also shells they start on other hosts."""


@dataclass(frozen=True)
class Launcher:
    """The chain of launchers above this process: its parent, the parent's parent, up to the first that is no launcher.

    A shell is no launcher, so a job that nohup has detached survives the end of its terminal.
    """

    processes: tuple[psutil.Process, ...] = field(default_factory=lambda: _launchers_above(psutil.Process()))

    def has_gone(self) -> bool:
        """Whether one of them has ended, so that signals no longer reach the ranks. Takes some ten microseconds for each."""
        return any(not _is_alive(process) for process in self.processes)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _launchers_above(process: psutil.Process) -> tuple[psutil.Process, ...]:
    found = []
    for parent in process.parents():
        try:
            if not _is_launcher(parent.cmdline()):
                break
        except psutil.Error:  # it belongs to another user
            break
        found.append(parent)
    return tuple(found)


def _is_launcher(words: list[str]) -> bool:
    # a script's command line begins with its interpreter; sshd without a terminal runs another host's launcher
    return (
        any(Path(word).name in PROGRAMS for word in words[:2])
        or any(mark in word for word in words for mark in MARKS)
        or (bool(words) and words[0].startswith("sshd: ") and words[0].endswith("@notty"))
    )
