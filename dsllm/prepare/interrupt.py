"""Lets the signals that end a job interrupt a preparation as Ctrl-C does: it cleans up, and can be continued."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

# SIGUSR1 is SLURM's warning; SIGHUP comes when a terminal is closed
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Until the block ends, signals raise KeyboardInterrupt, unless the caller handles or ignores them (as nohup does)."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread only
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    caught = [number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    before = {number: signal.signal(number, interrupt) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
