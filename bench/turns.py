"""Runs training programs one step at a time and keeps them stopped in between, so that other load slows all of them alike."""

import contextlib
import os
import queue
import re
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

STEP_LINE = re.compile(rb"\bstep (\d+)")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to train the same model on the same number of ranks."""

    name: str
    command: tuple[str, ...]
    num_ranks: int = 1
    threads_per_rank: int = 2
    environment: tuple[tuple[str, str], ...] = ()


class CandidateFailed(Exception):
    """The program ended, or printed no step line in time."""


class Runner:
    """A running candidate: its processes, and the time at which each of its step lines arrived."""

    def __init__(self, candidate: Candidate, folder: Path, log: Path):
        self.candidate, self.log = candidate, log
        environment = os.environ | {"OMP_NUM_THREADS": str(candidate.threads_per_rank), "PYTHONUNBUFFERED": "1"}
        log.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            candidate.command,
            cwd=folder,
            env=environment | dict(candidate.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._arrivals: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        newest = 0
        assert self.process.stdout is not None
        with self.process.stdout as lines, self.log.open("wb") as log:
            for line in lines:
                arrived = time.perf_counter()
                log.write(line)
                log.flush()
                found = STEP_LINE.search(line)
                if found and int(found.group(1)) > newest:
                    newest = int(found.group(1))
                    self._arrivals.put(arrived)
        self._arrivals.put(None)

    def wait_for_step(self, timeout_seconds: float) -> float:
        """Wait for the next step line; the time at which it arrived.

        Raises:
            CandidateFailed: the program ended, or the time is over.
        """
        try:
            arrived = self._arrivals.get(timeout=timeout_seconds)
        except queue.Empty:
            arrived = None
        if arrived is None:
            last = self.log.read_text(errors="replace").splitlines()[-20:]
            raise CandidateFailed(f"{self.candidate.name}: no step line in {timeout_seconds:.0f} s\n" + "\n".join(last))
        return arrived

    def turn(self, timeout_seconds: float = 300) -> float:
        """Let it run until its next step line, then stop it again; returns the seconds."""
        began = time.perf_counter()
        self.send(signal.SIGCONT)
        arrived = self.wait_for_step(timeout_seconds)
        self.send(signal.SIGSTOP)
        while not self._arrivals.empty():  # a step that ended before the stop took effect belongs to no turn
            self._arrivals.get()
        return arrived - began

    def family(self) -> list[psutil.Process]:
        """The started process and all its descendants."""
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every process of the candidate."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def peak_memory_gib(self) -> float:
        """Largest resident memory that any of its processes has had, in GiB."""
        peaks = []
        for process in self.family():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                peaks += [int(kib) for kib in re.findall(r"VmHWM:\s+(\d+)", status)]
        return max(peaks, default=0) / 2**20

    def end(self) -> None:
        """Kill all its processes."""
        self.send(signal.SIGKILL)
        self.process.wait()
        self._reader.join()
