"""Measures several candidates: starts and stops all of them, then lets each take one step in turn, round after round."""

import contextlib
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from bench.candidates import LITGPT_PYTHON, ROOT
from bench.turns import Candidate, CandidateFailed, Runner

RESULTS = ROOT / "bench" / "results"
WARM_UP_STEPS = 2
START_TIMEOUT_SECONDS = 400  # litgpt compiles for a minute, longer on a busy machine
LEAST_FREE_GIB = 3.0
"""A candidate is not started with less free memory: all stay loaded, and the kernel might kill any program of the machine."""


@dataclass
class Measured:
    """What was measured of one candidate."""

    name: str
    start_seconds: list[float] = field(default_factory=list)
    """From the command to the first step line, one number per start."""
    step_seconds: list[float] = field(default_factory=list)
    """One number per round."""
    peak_memory_gib: float = 0.0
    """Largest resident memory of any of its processes."""
    failure: str = ""


def measure(
    make: Callable[[Path], Iterable[Candidate]], rounds: int, starts: int = 1, wanted: Callable[[str], bool] = bool
) -> list[Measured]:
    """Start all candidates, then let each take one step in turn, for several rounds.

    Args:
        make: the candidates; called with a new folder for each start.
        wanted: whether to measure the candidate of a name.
    """
    scratch = Path(tempfile.mkdtemp(prefix="dsllm-bench-"))
    runners: list[tuple[Measured, Runner]] = []
    measured: list[Measured] = []
    try:
        for number, candidate in enumerate(make(scratch)):
            if not wanted(candidate.name) or not _there(candidate):
                continue
            measured.append(Measured(candidate.name))
            say(f"starting {candidate.name}")
            again = [list(make(scratch / str(i)))[number] for i in range(starts)]
            runner = _start(again, measured[-1])
            if runner:
                runners.append((measured[-1], runner))
        for turn in range(rounds):
            say(f"round {turn + 1} of {rounds}")
            for result, runner in runners[turn % len(runners) :] + runners[: turn % len(runners)]:
                result.step_seconds.append(runner.turn())
        for result, runner in runners:
            result.peak_memory_gib = runner.peak_memory_gib()
    finally:
        for _, runner in runners:
            runner.end()
        shutil.rmtree(scratch, ignore_errors=True)
    return measured


def _there(candidate: Candidate) -> bool:
    if Path(candidate.command[0]).exists():
        return True
    say(f"{candidate.name} is left out: {candidate.command[0]} is not there (make bench sets it up)")
    return False


def _start(starts: Sequence[Candidate], result: Measured) -> Runner | None:
    """Start a candidate several times and measure the time to its first step; the last one stays, warmed up and stopped."""
    for number, candidate in enumerate(starts):
        free_gib = psutil.virtual_memory().available / 2**30
        if free_gib < LEAST_FREE_GIB:
            result.failure = f"not started: only {free_gib:.1f} GiB of memory were free"
            say(f"{candidate.name}: {result.failure}")
            return None
        log = RESULTS / "logs" / f"{candidate.name}-{candidate.num_ranks}.log".replace(" ", "_")
        runner = Runner(candidate, ROOT, log)
        last = number == len(starts) - 1
        try:
            result.start_seconds.append(runner.wait_for_step(START_TIMEOUT_SECONDS) - runner.started)
            for _ in range(WARM_UP_STEPS if last else 0):
                runner.wait_for_step(START_TIMEOUT_SECONDS)
        except CandidateFailed as error:
            say(str(error))
            result.failure = str(error).splitlines()[0]
            runner.end()
            return None
        if not last:
            runner.end()
    runner.send(signal.SIGSTOP)
    return runner


def machine() -> dict[str, Any]:
    """The machine and the versions that the numbers are measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    versions = {}
    for name in ("torch", "deepspeed", "transformers", "accelerate"):
        with contextlib.suppress(PackageNotFoundError):  # not every bench needs them all
            versions[name] = version(name)
    if LITGPT_PYTHON.exists():
        show = "from importlib.metadata import PackageNotFoundError, version; print(version('litgpt'), version('lightning'))"
        found = subprocess.run([LITGPT_PYTHON, "-c", show], capture_output=True, text=True).stdout.split()
        versions |= dict(zip(("litgpt", "lightning"), found, strict=False))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": models[0] if models else platform.processor(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "versions": versions,
        "load_average": psutil.getloadavg()[0],
    }


def say(text: str) -> None:
    """Print a line with the time of day."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
