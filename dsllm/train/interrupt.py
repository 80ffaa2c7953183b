"""Signals ask for a stop; the loop finishes its step first, and all ranks agree on it."""

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last one: SLURM's warning, and what mpirun hands on


@dataclass
class Stop:
    """Whether this process was asked to stop, and by what. Launchers send signals twice, and to some ranks only."""

    signal_name: str = ""

    @property
    def requested(self) -> bool:
        """True once a signal has come."""
        return bool(self.signal_name)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Note a wish to stop instead of dying of it, until the block ends."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal_name = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
