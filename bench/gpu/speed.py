"""How fast is it on this device? dsllm compared with plain PyTorch, FSDP2 and transformers.Trainer, each in its own process."""

import itertools
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.candidates import ROOT, dsllm, module, torchrun
from bench.turns import Candidate, CandidateFailed, Runner
from bench.workloads import WORKLOADS

BASE = "plain PyTorch, compiled"
WARM_UP_STEPS, STEPS = 5, 15
LEAST_SECONDS = 25.0
"""A candidate is not started with less time left."""


def candidates(size: str, folder: Path, gpu: bool) -> dict[str, tuple[str, ...]]:
    """Name -> command, the most informative first: if the time runs out, the last ones are left out."""
    workload = ("--workload", size)

    def own(stage: int, *more: str) -> tuple[str, ...]:
        scratch = folder / "-".join(("run", *more)).replace("=", "-")
        precision = "bf16" if gpu else "fp32_compute_bf16"
        return (sys.executable, *dsllm(size, scratch, stage, 1), f"train.precision={precision}", *more)

    compiled = ("--compile",) if gpu else ()
    found = {
        BASE: module("bench.peers.plain", *workload, *compiled),
        "dsllm, ZeRO-1": own(1),
        "dsllm, ZeRO-3": own(3),
        "FSDP2, compiled": torchrun(1, "-m", "bench.peers.fsdp", *workload, *compiled),
        "transformers.Trainer": module("bench.peers.trainer", *workload),
        "dsllm, ZeRO-0": own(0),
        "dsllm, ZeRO-2": own(2),
    }
    if not gpu:
        return found
    more = {
        "dsllm, ZeRO-1, compiled": own(1, "train.compile=true"),
        "dsllm, ZeRO-1, Liger": own(1, "train.kernels=liger"),
        "dsllm, ZeRO-3, compiled": own(3, "train.compile=true"),
        "transformers.Trainer, compiled": module("bench.peers.trainer", *workload, "--compile"),
    }
    first = (BASE, "dsllm, ZeRO-1", "dsllm, ZeRO-1, compiled", "FSDP2, compiled", "transformers.Trainer, compiled")
    both = found | more
    return {name: both[name] for name in (*first, *(name for name in both if name not in first))}


@dataclass
class Measured:
    """One candidate at one size."""

    size: str
    name: str
    step_seconds: list[float] = field(default_factory=list)
    peak_memory_gib: float = 0.0
    start_seconds: float = 0.0
    """From the command to the end of the first step."""
    problem: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the median step; 0 if it failed."""
        if not self.step_seconds:
            return 0.0
        return WORKLOADS[self.size].tokens_per_step / statistics.median(self.step_seconds)

    @property
    def flops(self) -> float:
        """Model FLOPs per second."""
        return self.tokens_per_second * WORKLOADS[self.size].flops_per_token


def in_order(sizes: list[str], folder: Path, gpu: bool) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Size, name and command: each candidate at every size before the next one."""
    commands = {size: list(candidates(size, folder / size, gpu).items()) for size in sizes}
    for place in range(max(len(found) for found in commands.values())):
        for size, found in commands.items():
            yield size, *found[place]


def run_speed(
    sizes: list[str], folder: Path, gpu: bool, seconds: float, report: Callable[[str], None]
) -> list[Measured]:
    """Measure until the time is over; what is not measured is reported as such."""
    deadline, results = time.monotonic() + seconds, []
    for size, name, command in in_order(sizes, folder, gpu):
        left = deadline - time.monotonic()
        result = Measured(size, name)
        if left < LEAST_SECONDS:
            result.problem = "not run: out of time"
        else:
            measure(result, command, folder / f"{size}-{len(results)}.log", left)
        found = f"{result.tokens_per_second:,.0f} tokens/s, first step after {result.start_seconds:.0f} s"
        report(f"{size}  {name}: {result.problem or found}")
        results.append(result)
    return results


def measure(result: Measured, command: tuple[str, ...], log: Path, seconds: float) -> None:
    """Start it, let it warm up, and measure the time between its step lines, which it prints when the device is done."""
    deadline = time.monotonic() + seconds
    runner = Runner(Candidate(name=result.name, command=command, threads_per_rank=4), ROOT, log)
    try:
        arrived = []
        for _ in range(WARM_UP_STEPS + STEPS + 1):
            arrived.append(runner.wait_for_step(max(1.0, deadline - time.monotonic())))
        result.start_seconds = arrived[0] - runner.started
        late = arrived[WARM_UP_STEPS:]
        result.step_seconds = [stop - start for start, stop in itertools.pairwise(late)]
        printed = re.findall(r"([\d.]+) GiB", log.read_text(errors="replace"))
        result.peak_memory_gib = float(printed[-1]) if printed else runner.peak_memory_gib()
    except CandidateFailed as error:
        result.problem = f"failed: {' / '.join(str(error).splitlines()[-3:])[-300:]}"
    finally:
        runner.end()
