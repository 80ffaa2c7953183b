"""Waits for ranks that have outlived the programs that watch them, so that a job is judged by what its ranks write last."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dsllm.launch.exit_code import Status, is_running, read_patiently
from dsllm.launch.follow import Waits
from dsllm.launch.processes import end_processes, jobs_on_this_machine
from dsllm.run_directory import is_locked, read_status

_LOOK_AGAIN_SECONDS = 0.5


@dataclass(frozen=True)
class Remaining:
    """What is left of a job whose commands have all ended: usually nothing.

    A host's watch ends the job's processes before it ends itself. If the watch was killed, the ranks notice, save and
    exit by themselves, and until then status.json says that they run.
    """

    job: str
    """Name of the job."""
    run_directory: Path
    before: Status
    """status.json before the start."""

    def status(self, waits: Waits, report: Callable[[str], None]) -> Status:
        """status.json once the ranks are gone, or after the time that they have for saving.

        Processes of this machine that are then still there are killed.

        Raises:
            RunError, OSError: status.json cannot be read.
        """
        began, reported = time.monotonic(), False
        read = partial(read_patiently, partial(read_status, self.run_directory))
        while (most := self._wait_for(read(), waits)) and time.monotonic() - began < most:
            if not reported:
                report(
                    f"a program that watched the ranks has ended before them: waiting at most {most:g} s while they save"
                )
                reported = True
            time.sleep(_LOOK_AGAIN_SECONDS)
        for name in jobs_on_this_machine(self.job):
            end_processes(name, 0)
        return read()

    def _wait_for(self, status: Status, waits: Waits) -> float:
        """Seconds to wait for ranks in all; 0: none is left."""
        if jobs_on_this_machine(self.job):
            return waits.save
        if not is_running(self.before, status):
            return 0.0
        locked = is_locked(self.run_directory)
        # without locks nobody can tell whether rank 0 still lives on its host
        return waits.end if locked is None else waits.save if locked else 0.0
