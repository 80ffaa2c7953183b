"""Signals ask for a stop, and so does a launcher that has gone; the loop finishes its step, and all ranks agree on it."""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType

from dsllm.engine.processes.launcher import Launcher

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last one: SLURM's warning, and what mpirun hands on


@dataclass
class Stop:
    """Whether this process was asked to stop, and by what. Launchers send signals twice, and to some ranks only."""

    reason: str = ""
    """A signal's name, or that the launcher has gone; empty while there is none."""
    launcher: Launcher = field(default_factory=Launcher)

    @property
    def requested(self) -> bool:
        """True once there is a reason to stop."""
        if not self.reason and self.launcher.has_gone():
            self.reason = "the launcher has gone"
        return bool(self.reason)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Note a wish to stop instead of dying of it, until the block ends."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.reason = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
