"""Tokens per second, memory and start-up of dsllm beside other training loops, all in one run: `make bench`."""

import argparse
import json
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil
import report
from candidates import BASE, GROUPS, LITGPT_PYTHON, RECIPE, ROOT
from turns import Candidate, CandidateFailed, Runner

TOKENS_PER_STEP = 2048
WARM_UP_STEPS = 2
START_TIMEOUT_SECONDS = 400  # litgpt compiles for a minute, longer on a busy machine


@dataclass
class Measured:
    """What one candidate showed."""

    name: str
    start_seconds: list[float] = field(default_factory=list)
    """From the command to the first step line, one number per start."""
    step_seconds: list[float] = field(default_factory=list)
    """One number per round."""
    peak_memory_gib: float = 0.0
    """Largest resident memory of any one of its processes."""
    failure: str = ""


def main() -> int:
    options = parse()
    results = ROOT / "bench" / "results"
    results.mkdir(exist_ok=True)
    prepare_data()
    groups = {}
    for name, make in GROUPS.items():
        if options.group in name:
            groups[name] = [asdict(m) for m in measure_group(make, options, results / "logs")]
    record = {"machine": machine(), "tokens_per_step": TOKENS_PER_STEP, "base": BASE, "groups": groups}
    file = results / time.strftime("throughput-%Y%m%d-%H%M%S.json")
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(report.tables(record))
    if options.write:
        report.write(report.tables(record), ROOT / "bench" / "RESULTS.md")
    print(f"raw numbers: {file.relative_to(ROOT)}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="steps of each candidate that count")
    parser.add_argument("--starts", type=int, default=3, help="starts of each candidate whose time is taken")
    parser.add_argument("--group", default="", help="only groups with this in their name: process, ranks")
    parser.add_argument("--only", default="", help="only the base, and names that hold one of these words (by comma)")
    parser.add_argument("--write", action="store_true", help="put the tables into bench/RESULTS.md")
    return parser.parse_args()


def prepare_data() -> None:
    """Token shards for dsllm, made before anything is measured; also warms the disk for the libraries."""
    subprocess.run([sys.executable, "-c", "import deepspeed, transformers"], cwd=ROOT, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "dsllm", "prepare", RECIPE], cwd=ROOT, check=True)


def measure_group(make: Callable[[Path], list[Candidate]], options: argparse.Namespace, logs: Path) -> list[Measured]:
    """Start all, then give each one step in turn for several rounds; the first candidate is the base."""
    scratch = Path(tempfile.mkdtemp(prefix="dsllm-bench-"))
    runners: list[tuple[Measured, Runner]] = []
    measured: list[Measured] = []
    try:
        for number, candidate in enumerate(make(scratch)):
            if not wanted(candidate, options.only.split(",")):
                continue
            measured.append(Measured(candidate.name))
            say(f"starting {candidate.name}")
            starts = [make(scratch / str(i))[number] for i in range(options.starts)]
            runner = start(starts, measured[-1], logs)
            if runner:
                runners.append((measured[-1], runner))
        for turn in range(options.rounds):
            say(f"round {turn + 1} of {options.rounds}")
            for result, runner in runners[turn % len(runners) :] + runners[: turn % len(runners)]:
                result.step_seconds.append(runner.turn())
        for result, runner in runners:
            result.peak_memory_gib = runner.peak_memory_gib()
    finally:
        for _, runner in runners:
            runner.end()
        shutil.rmtree(scratch, ignore_errors=True)
    return measured


def wanted(candidate: Candidate, only: Sequence[str]) -> bool:
    if not Path(candidate.command[0]).exists():
        say(f"{candidate.name} is left out: {candidate.command[0]} is not there (make bench sets it up)")
        return False
    return candidate.name == BASE or any(part in candidate.name for part in only)


def start(starts: Sequence[Candidate], result: Measured, logs: Path) -> Runner | None:
    """Start a candidate several times and take the time to its first step; the last stays, warmed up and stopped."""
    for number, candidate in enumerate(starts):
        runner = Runner(candidate, ROOT, logs / f"{candidate.name}-{candidate.num_ranks}.log".replace(" ", "_"))
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


def machine() -> dict:
    """What the numbers were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    libraries = ("torch", "deepspeed", "transformers", "accelerate")
    versions = {name: version(name) for name in libraries}
    if LITGPT_PYTHON.exists():
        show = "from importlib.metadata import version; print(version('litgpt'))"
        versions["litgpt"] = subprocess.run([LITGPT_PYTHON, "-c", show], capture_output=True, text=True).stdout.strip()
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
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
