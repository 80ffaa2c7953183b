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
from dsllm.launch.processes import end_processes, processes_of, ranks_among, send_signal

STOP, END = "stop", "end"
"""The words on standard input. STOP: save and exit. END: the other hosts have ended, so exit soon. The end of the input
means STOP too: our parent is gone."""

_POLL_SECONDS = 0.2
_LAST_OUTPUT_SECONDS = 2.0


@dataclass
class HostWatcher:
    """Stops the host's launcher and ranks, and kills them at a deadline."""

    job: str
    process: subprocess.Popen[bytes]
    options: argparse.Namespace
    stopping: bool = False
    deadline: float = float("inf")

    def stop(self) -> None:
        """Ask the ranks to save and exit."""
        if self.stopping:
            return
        self.stopping, self.deadline = True, min(self.deadline, time.monotonic() + self.options.save_seconds)
        if self.options.stop_command_by:
            self.process.send_signal(signal.Signals[self.options.stop_command_by])
        elif ranks := ranks_among(processes_of(self.job)):
            send_signal(ranks, signal.SIGTERM)  # not through DeepSpeed's launcher, which signals one after the other
        else:  # no rank has been started yet
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)

    def end(self) -> None:
        """The run or another host has ended: a process that is still here after end_seconds hangs."""
        self.deadline = min(self.deadline, time.monotonic() + self.options.end_seconds)

    def follow(self) -> None:
        """Act on the words from standard input until the launcher has ended; kill at the deadline."""
        partial_line = ""
        inputs = [sys.stdin.fileno()]
        while self.process.poll() is None:
            ready, _, _ = select.select(inputs, [], [], _POLL_SECONDS)
            if ready:
                text = os.read(inputs[0], 4096).decode(errors="replace")
                *words, partial_line = (partial_line + text).split("\n")
                if not text:
                    inputs, words = [], [STOP]
                for word in words:
                    self.stop() if word == STOP else self.end()
            if time.monotonic() >= self.deadline:
                send_signal(processes_of(self.job), signal.SIGKILL)
                self.process.kill()


def main(arguments: Sequence[str]) -> int:
    """Run the launcher; its exit code as a shell gives it, or 1 if rank 0's port is taken."""
    options = _parse(arguments)
    if options.node == 0 and options.port and not _is_free(options.port):
        sys.stderr.write(
            f"dsllm launch: error: port {options.port} is in use on {socket.gethostname()}: "
            "set another port in the cluster file, or end the program that uses it\n"
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
    watcher.follow()
    code = process.wait()
    outlived = end_processes(job, 0 if time.monotonic() >= watcher.deadline else options.end_seconds)
    output.join(_LAST_OUTPUT_SECONDS)
    if outlived:
        with contextlib.suppress(OSError):  # our parent may be gone
            sys.stderr.write(f"dsllm launch: processes of {job} outlived their launcher and were ended\n")
    return code if code >= 0 else 128 - code


def _pass_on(source: IO[bytes]) -> None:
    """Forward the ranks' output to our parent; drop it if the parent is gone, so that printing cannot kill a rank."""
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
    options.command = options.command[1:]  # without the `--` in front of it
    return options


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT can be used
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
