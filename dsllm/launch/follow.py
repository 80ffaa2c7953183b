"""Starts a plan's commands and follows them as one: output, signals, the end in bounded time."""

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

from dsllm.launch.node import END, STOP

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

_POLL_SECONDS = 0.3
_LAST_OUTPUT_SECONDS = 2.0
_GRACE_SECONDS = 30.0
"""Beyond what a host was given to end its ranks: the host itself does not answer any more."""

Tell = Callable[[str], None]


@dataclass
class StopRequest:
    """The signal that asked us to stop, if one came."""

    by: signal.Signals | None = None


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Note the signals that mean stop, instead of dying of them, until the block ends."""
    stop = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        stop.by = signal.Signals(number)

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True, kw_only=True)
class Waits:
    """How long to wait, in seconds; see TimeoutConfig."""

    save: float
    end: float


@dataclass
class _Started:
    """A host's command on this machine."""

    process: subprocess.Popen
    prefix: bytes
    waiting: bytes = b""


@dataclass
class _Job:
    started: Mapping[str, _Started]
    selector: selectors.BaseSelector
    write: Callable[[bytes], None]
    waits: Waits
    deadline: float = float("inf")
    told: set[str] = field(default_factory=set)

    def alive(self) -> list[str]:
        return [host for host, one in self.started.items() if one.process.poll() is None]

    def tell(self, word: str) -> None:
        """Say a word to the hosts that still run, once."""
        if word in self.told:
            return
        self.told.add(word)
        wait = self.waits.save if word == STOP else self.waits.end
        self.deadline = min(self.deadline, time.monotonic() + wait + _GRACE_SECONDS)
        for host in self.alive():
            pipe = self.started[host].process.stdin
            with contextlib.suppress(BrokenPipeError):
                _of(pipe).write(f"{word}\n".encode())
                _of(pipe).flush()

    def give_up(self, hosts: Sequence[str]) -> None:
        """Past the deadline: end the connection to hosts that did not end their part themselves."""
        if time.monotonic() >= self.deadline:
            for host in hosts:
                self.started[host].process.kill()

    def read(self, wait_seconds: float) -> None:
        """Pass on what hosts have written, whole lines with the host's name."""
        for key, _ in self.selector.select(wait_seconds):
            one: _Started = key.data
            data = os.read(key.fd, 65536)
            *lines, one.waiting = (one.waiting + data).split(b"\n")
            if not data:
                self.selector.unregister(key.fileobj)
                lines, one.waiting = ([one.waiting] if one.waiting else []), b""
            for line in lines:
                self.write(one.prefix + line + b"\n")


def _of(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "opened by subprocess.PIPE"
    return pipe


def follow(
    commands: Mapping[str, tuple[str, ...]],
    waits: Waits,
    stop: StopRequest,
    is_over: Callable[[], bool],
    write: Callable[[bytes], None],
) -> dict[str, int]:
    """Run every host's command to its end; exit codes by host, negative for signals and for hosts given up.

    The first end of a command, or of the run, gives the others `waits.end` seconds; a stop gives all `waits.save`. Who
    is still there then is killed by his own host's watch, and the connection to him a little later by us.

    Args:
        is_over: whether the run's own status says that it has ended.
        write: takes the output, line by line.
    """
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        started = {}
        for host, words in commands.items():
            process = stack.enter_context(_process(words))
            started[host] = _Started(process=process, prefix=f"{host}: ".encode() if len(commands) > 1 else b"")
            selector.register(_of(process.stdout), selectors.EVENT_READ, started[host])
        job = _Job(started=started, selector=selector, write=write, waits=waits)
        while alive := job.alive():
            job.read(_POLL_SECONDS)
            if stop.by:
                job.tell(STOP)
            if len(job.alive()) < len(commands) or is_over():
                job.tell(END)
            job.give_up(alive)
        until = time.monotonic() + _LAST_OUTPUT_SECONDS  # a process that outlived its host's watch may hold the pipe
        while selector.get_map() and time.monotonic() < until:
            job.read(_POLL_SECONDS)
        return {host: one.process.returncode for host, one in started.items()}


@contextlib.contextmanager
def _process(words: tuple[str, ...]) -> Iterator[subprocess.Popen]:
    """A command in its own session, so that a terminal's Ctrl-C reaches it only through us; dead when the block ends."""
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                _of(pipe).close()
