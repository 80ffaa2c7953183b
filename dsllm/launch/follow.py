"""Starts the commands of all hosts and follows them as one: output, signals, an end in bounded time."""

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
"""A host whose ranks are still running this long after its own deadline no longer answers."""


@dataclass
class StopRequest:
    """The request to stop, once a signal has made one."""

    by: signal.Signals | None = None
    """The signal; None: no request so far."""


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Until the block ends, turn the signals that mean stop into a request, instead of dying of them."""
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
class _HostCommand:
    """A host's command, running on this machine."""

    process: subprocess.Popen[bytes]
    prefix: bytes
    partial_line: bytes = b""


@dataclass
class _RunningJob:
    hosts: Mapping[str, _HostCommand]
    selector: selectors.BaseSelector
    write: Callable[[bytes], None]
    waits: Waits
    deadline: float = float("inf")
    sent: set[str] = field(default_factory=set)

    def alive(self) -> list[str]:
        return [name for name, host in self.hosts.items() if host.process.poll() is None]

    def send(self, word: str) -> None:
        """Send a word to the hosts that still run, once."""
        if word in self.sent:
            return
        self.sent.add(word)
        wait = self.waits.save if word == STOP else self.waits.end
        self.deadline = min(self.deadline, time.monotonic() + wait + _GRACE_SECONDS)
        for name in self.alive():
            pipe = self.hosts[name].process.stdin
            with contextlib.suppress(BrokenPipeError):
                _opened(pipe).write(f"{word}\n".encode())
                _opened(pipe).flush()

    def give_up(self, names: Sequence[str]) -> None:
        """Past the deadline, close the connection to hosts that did not end by themselves."""
        if time.monotonic() >= self.deadline:
            for name in names:
                self.hosts[name].process.kill()

    def read(self, wait_seconds: float) -> None:
        """Pass on what the hosts have written, in whole lines with the host's name."""
        for key, _ in self.selector.select(wait_seconds):
            host: _HostCommand = key.data
            data = os.read(key.fd, 65536)
            *lines, host.partial_line = (host.partial_line + data).split(b"\n")
            if not data:
                self.selector.unregister(key.fileobj)
                lines, host.partial_line = ([host.partial_line] if host.partial_line else []), b""
            for line in lines:
                self.write(host.prefix + line + b"\n")


def _opened(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "opened by subprocess.PIPE"
    return pipe


def follow(
    commands: Mapping[str, tuple[str, ...]],
    waits: Waits,
    stop: StopRequest,
    has_ended: Callable[[], bool],
    write: Callable[[bytes], None],
) -> dict[str, int]:
    """Run every host's command until it ends; exit codes by host, negative after a signal or if we gave the host up.

    When a command or the run has ended, the others have `waits.end` seconds left; a request to stop gives all
    `waits.save`. Each host's watcher then kills what remains; a little later we close the connection.

    Args:
        has_ended: whether the run's own status says that it has ended.
        write: takes the output, line by line.
    """
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        hosts = {}
        for name, words in commands.items():
            process = stack.enter_context(_process(words))
            hosts[name] = _HostCommand(process=process, prefix=f"{name}: ".encode() if len(commands) > 1 else b"")
            selector.register(_opened(process.stdout), selectors.EVENT_READ, hosts[name])
        job = _RunningJob(hosts=hosts, selector=selector, write=write, waits=waits)
        while alive := job.alive():
            job.read(_POLL_SECONDS)
            if stop.by:
                job.send(STOP)
            if len(job.alive()) < len(commands) or has_ended():
                job.send(END)
            job.give_up(alive)
        until = time.monotonic() + _LAST_OUTPUT_SECONDS  # a process that outlived its host's watcher may hold the pipe
        while selector.get_map() and time.monotonic() < until:
            job.read(_POLL_SECONDS)
        return {name: host.process.returncode for name, host in hosts.items()}


@contextlib.contextmanager
def _process(words: tuple[str, ...]) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a session of its own, killed when the block ends."""
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a terminal's Ctrl-C reaches it only through us
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                _opened(pipe).close()
