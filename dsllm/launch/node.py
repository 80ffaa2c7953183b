"""Runs on each host as `python -m dsllm.launch.node`: starts the host's launcher, and leaves no process of the job behind."""

import argparse
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO

from dsllm.errors import EXIT_FAILED
from dsllm.launch.job import JOB_VARIABLE
from dsllm.launch.processes import end_processes, processes_of, ranks_among, send

STOP, END = "stop", "end"
"""The words that come over standard input: save and leave; the others have ended, so leave soon. Its end means stop, too:
whoever started us has gone."""

_POLL_SECONDS = 0.2
_LAST_OUTPUT_SECONDS = 2.0


@dataclass
class HostWatcher:
    """What the host's launcher was asked to do, and until when it has time for it."""

    job: str
    process: subprocess.Popen
    options: argparse.Namespace
    request: str = ""
    deadline: float = float("inf")

    def stop(self) -> None:
        """Ask the ranks to save and leave: themselves, because DeepSpeed's launcher tells one after the other."""
        if self.request:
            return
        self.request, self.deadline = STOP, min(self.deadline, time.monotonic() + self.options.save_seconds)
        if self.options.stop_command_by:
            self.process.send_signal(signal.Signals[self.options.stop_command_by])
        elif ranks := ranks_among(processes_of(self.job)):
            send(ranks, signal.SIGTERM)
        else:  # no rank has been started yet
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)

    def end(self) -> None:
        """The run or another host has ended: what is still here after end_seconds hangs."""
        self.deadline = min(self.deadline, time.monotonic() + self.options.end_seconds)


def main(arguments: Sequence[str]) -> int:
    """The launcher's exit code, as a shell gives it; 1 where rank 0's port is taken."""
    options = _parse(arguments)
    if options.node == 0 and options.port and not _is_free(options.port):
        sys.stderr.write(
            f"dsllm launch: error: port {options.port} is in use on {socket.gethostname()}: "
            "give the cluster another port, or end what listens there\n"
        )
        return EXIT_FAILED
    job = os.environ[JOB_VARIABLE]
    process = subprocess.Popen(
        options.command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    output = threading.Thread(target=_pass_on, args=(process.stdout,), daemon=True)
    output.start()
    watcher = HostWatcher(job=job, process=process, options=options)

    def on_signal(number: int, frame: FrameType | None) -> None:
        watcher.stop()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, on_signal)
    _wait(watcher)
    code = process.wait()
    outlived = end_processes(job, 0 if time.monotonic() >= watcher.deadline else options.end_seconds)
    output.join(_LAST_OUTPUT_SECONDS)
    if outlived:
        with contextlib.suppress(OSError):  # nobody may be there to read it
            sys.stderr.write(f"dsllm launch: processes of {job} outlived their launcher and were ended\n")
    return code if code >= 0 else 128 - code


def _pass_on(source: IO[bytes]) -> None:
    """The ranks' output, to whoever started us; when he has gone it is dropped: a rank that prints must not die of that."""
    while data := os.read(source.fileno(), 65536):
        with contextlib.suppress(OSError):
            os.write(sys.stdout.fileno(), data)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dsllm.launch.node")
    parser.add_argument("--node", type=int, required=True)
    parser.add_argument("--port", type=int)
    parser.add_argument("--save-seconds", type=float, required=True)
    parser.add_argument("--end-seconds", type=float, required=True)
    parser.add_argument("--stop-command-by", choices=["SIGUSR1", "SIGTERM"])
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(list(arguments))
    options.command = options.command[1:]  # the `--` before it
    return options


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT can be had
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _wait(watcher: HostWatcher) -> None:
    """Until the launcher has ended: follow the words from standard input, and kill at the deadline."""
    waiting = ""
    inputs = [sys.stdin.fileno()]
    while watcher.process.poll() is None:
        ready, _, _ = select.select(inputs, [], [], _POLL_SECONDS)
        if ready:
            read = os.read(inputs[0], 4096).decode(errors="replace")
            *words, waiting = (waiting + read).split("\n")
            if not read:
                inputs, words = [], [STOP]
            for word in words:
                watcher.stop() if word == STOP else watcher.end()
        if time.monotonic() >= watcher.deadline:
            send(processes_of(watcher.job), signal.SIGKILL)
            watcher.process.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
