"""Notes requests to stop: a signal, or a launcher that is gone. The loop then finishes its step, and all ranks stop."""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType

from dsllm.engine.processes.launcher import Launcher

# SIGUSR1 is SLURM's warning, and what mpirun forwards; SIGHUP comes when a terminal is closed
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@dataclass
class Stop:
    """Whether this process received a signal to stop, and which. Launchers send signals twice, and to some ranks only."""

    reason: str = ""
    """A signal's name, or that the launcher is gone; empty while there is none."""
    launcher: Launcher = field(default_factory=Launcher)

    def requested(self) -> bool:
        """Whether there is a reason to stop; also looks whether the launcher is still there."""
        if not self.reason and self.launcher.has_gone():
            self.reason = "the launcher is gone"
        return bool(self.reason)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Record signals that ask this process to stop, until the block ends; outside it they end the process as usual."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.reason = signal.Signals(number).name

    caught = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, note) for number in caught}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
