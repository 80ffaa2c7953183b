"""Notes requests to stop: a signal, or a launcher that is gone. The loop then finishes its step, and all ranks stop."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType

from dsllm.engine.processes.launcher import Launcher
from dsllm.errors import EXIT_FORCED, Interrupted

# SIGUSR1 is SLURM's warning, and what mpirun forwards; SIGHUP comes when a terminal is closed
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ECHO_SECONDS = 0.2
"""A second SIGINT within this time is the same Ctrl-C, which came from the terminal and from a launcher."""
_LAST_WORDS_SECONDS = 1.0


@dataclass
class Stop:
    """Whether this process received a signal to stop, and which. Launchers send signals twice, and to some ranks only."""

    reason: str = ""
    """A signal's name, or that the launcher is gone; empty while there is none."""
    launcher: Launcher = field(default_factory=Launcher)
    report: Callable[[str], None] = lambda text: None
    """Prints a line; used from another thread."""
    in_steps: bool = False
    """Whether the run is taking steps, so that it can save."""
    last_words: Callable[[], object] = lambda: None
    """Called before a second Ctrl-C ends the process, for at most a second."""
    _at_once: bool = field(init=False, default=False)
    _raised: bool = field(init=False, default=False)
    _heard: bool = field(init=False, default=False)
    _interrupted_at: float | None = field(init=False, default=None)

    def requested(self) -> bool:
        """Whether there is a reason to stop; also looks whether the launcher is still there."""
        if not self.reason and self.launcher.has_gone():
            self.reason = "the launcher is gone"
        return bool(self.reason)

    def why(self) -> str:
        """The reason to stop; empty: there is none."""
        self.requested()
        return self.reason

    def raise_at_once(self, yes: bool) -> None:
        """From now on a signal raises where the process is (yes), or is only noted (no).

        Raises:
            Interrupted: (yes) a signal came before this call.
        """
        self._at_once = yes
        if yes and self.reason:
            raise Interrupted(self.reason)

    def begin_steps(self, last_words: Callable[[], object]) -> None:
        """From now on a signal is noted, and the loop saves after its step."""
        self._at_once, self.in_steps, self.last_words = False, True, last_words

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler proper, which Python calls between two steps of the main thread."""
        self.reason = self.reason or signal.Signals(number).name
        if self._at_once:
            # launchers send signals twice: the second must not disturb the end
            self._at_once, self._raised = False, True
            raise Interrupted(self.reason)

    def hear(self, number: int) -> None:
        """Called from a thread as soon as a signal arrives, also while the main thread is inside a long call."""
        first, self._heard = not self._heard, True
        self.reason = self.reason or signal.Signals(number).name
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at is None:
                self._interrupted_at = now
            elif now - self._interrupted_at >= ECHO_SECONDS:
                self._end_now()
        if first and self.in_steps:
            again = "; a second Ctrl-C ends it at once, without saving" if number == signal.SIGINT else ""
            self.report(f"{self.reason}: the run stops after this step and saves{again}")
        elif first and not self._at_once and not self._raised:
            self.report(f"{self.reason}: the run stops before its first step")

    def _end_now(self) -> None:
        """End the process: the main thread may be inside a collective that another rank does not come to."""
        writer = threading.Thread(target=self.last_words, daemon=True)
        writer.start()
        writer.join(_LAST_WORDS_SECONDS)
        self.report("SIGINT again: ended at once; nothing was saved since the newest checkpoint")
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(EXIT_FORCED)


@contextlib.contextmanager
def stop_signals(report: Callable[[str], None] = lambda text: None) -> Iterator[Stop]:
    """Record signals that ask this process to stop, until the block ends; outside it they end the process as usual.

    Args:
        report: prints a line as soon as a signal arrives
    """
    stop = Stop(report=report)
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to the main thread alone
        yield stop
        return
    caught = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, stop.handle) for number in caught}
    try:
        with _heard_at_once(stop, caught):
            yield stop
    finally:
        stop.raise_at_once(False)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _heard_at_once(stop: Stop, caught: Sequence[signal.Signals]) -> Iterator[None]:
    """Let a thread hear the signals: Python's own handler has to wait while the main thread is inside a long call."""
    arriving, written = socket.socketpair()
    written.setblocking(False)

    def listen() -> None:
        while numbers := arriving.recv(64):
            for number in numbers:
                if number in caught:  # the signals of other handlers come here too
                    stop.hear(number)

    def leave_fork() -> None:
        """A forked child must not wake this process up, nor raise what only the run's own process handles."""
        for number in caught:
            if signal.getsignal(number) == stop.handle:
                signal.set_wakeup_fd(-1)
                signal.signal(number, signal.SIG_DFL)

    before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=leave_fork)
    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        written.close()
        listener.join(_LAST_WORDS_SECONDS)
        arriving.close()
