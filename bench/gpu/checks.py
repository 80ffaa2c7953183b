"""Is it right on this device? Short runs of `dsllm train` whose curves must be equal up to rounding, and the parity table."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.candidates import RECIPE, ROOT

NUM_STEPS = 20
MOST_LOSS = 0.01
"""Largest difference, in nats, between two runs that differ by rounding only. bf16 keeps 8 bits, so a loss near 9 is off by at
most 0.02 per token and far less in the mean of 2048; over the 20 steps, fp32 and bf16 differed by 0.0015 on a CPU."""
MOST_NORM = 0.02
"""Largest relative difference between their gradient norms (measured: 0.001). AdamW cancels a wrong factor on the gradient, so
the loss does not show it, but the norm does."""
SHAPE = (
    "model.num_layers=4 model.hidden_size=256 model.num_heads=4 model.mlp_size=704 data.sequence_length=256 "
    f"train.global_batch_sequences=8 train.micro_batch_sequences=4 train.total_tokens={NUM_STEPS * 8 * 256}"
).split()

Row = dict[str, float]
Curve = list[Row]
"""The rows of a run's metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A run, and what must be true of its curve."""

    name: str
    words: str
    """Options and overrides of `dsllm train`, without the shape."""
    like: str = ""
    """The check whose curve it must follow; empty (default): it is judged by itself."""
    gpu_only: bool = False

    @property
    def file(self) -> str:
        """Its name as a file name."""
        return self.name.replace(" ", "-").replace(",", "").replace("/", "-")


def bf16(stage: int, words: str = "") -> str:
    """A bf16 run at a ZeRO stage."""
    return f"deepspeed=ds_configs/zero{stage}.json train.precision=bf16 {words}"


REFERENCE, MASKED = "bf16, ZeRO-1", "bf16, ZeRO-1, document mask"
SCALED = "fp16, ZeRO-1, from a scale that overflows"
CHECKS = [
    Check(name=REFERENCE, words=bf16(1)),
    Check(name="fp32, ZeRO-0", words="deepspeed=ds_configs/zero0.json train.precision=fp32", like=REFERENCE),
    Check(name="fp32, ZeRO-3", words="deepspeed=ds_configs/zero3.json train.precision=fp32", like=REFERENCE),
    *(Check(name=f"bf16, ZeRO-{stage}", words=bf16(stage), like=REFERENCE) for stage in (0, 2, 3)),
    *(
        Check(
            name=f"fp16, ZeRO-{stage}",
            words=f"deepspeed=ds_configs/zero{stage}.json train.precision=fp16 train.loss_scale.static=1024",
            like=REFERENCE,
            gpu_only=True,
        )
        for stage in (1, 2, 3)
    ),
    Check(
        name=SCALED,
        words="deepspeed=ds_configs/zero1.json train.precision=fp16 train.loss_scale.initial_power=24",
        gpu_only=True,
    ),
    Check(
        name="fp32 with bf16 inside, ZeRO-0",
        words="deepspeed=ds_configs/zero0.json train.precision=fp32_compute_bf16",
        like=REFERENCE,
    ),
    Check(name="activation checkpointing", words=bf16(1, "train.activation_checkpointing=full"), like=REFERENCE),
    Check(
        name="activation offload",
        words=bf16(1, "train.activation_checkpointing=full train.activation_offload=true"),
        like=REFERENCE,
        gpu_only=True,
    ),
    *(
        Check(
            name=f"offload, ZeRO-{stage}",
            words=f"deepspeed=ds_configs/zero{stage}_offload.json train.precision=bf16",
            like=REFERENCE,
            gpu_only=True,
        )
        for stage in (1, 2, 3)
    ),
    Check(name="compiled", words=bf16(1, "train.compile=true"), like=REFERENCE, gpu_only=True),
    Check(name="Liger", words=bf16(1, "train.kernels=liger"), like=REFERENCE, gpu_only=True),
    Check(name="compiled, ZeRO-3", words=bf16(3, "train.compile=true"), like=REFERENCE, gpu_only=True),
    Check(name=MASKED, words=bf16(1, "data.document_mask=true")),
    Check(
        name="document mask, fp32",
        words="deepspeed=ds_configs/zero0.json train.precision=fp32 data.document_mask=true",
        like=MASKED,
    ),
    Check(
        name="document mask, compiled",
        words=bf16(1, "data.document_mask=true train.compile=true"),
        like=MASKED,
        gpu_only=True,
    ),
]


@dataclass(frozen=True)
class Result:
    """How a check went."""

    name: str
    passed: bool
    detail: str
    seconds: float


def run_checks(gpu: bool, folder: Path, seconds: float, report: Callable[[str], None]) -> list[Result]:
    """Run all checks that this device can run, several at once, and the parity table. What is not done in time fails."""
    wanted = [check for check in CHECKS if gpu or not check.gpu_only]
    deadline = time.monotonic() + seconds
    with ThreadPoolExecutor(min(8, max(2, (os.cpu_count() or 2) // 2))) as pool:
        parity = pool.submit(run_parity, gpu, folder, deadline)
        runs = {check.name: pool.submit(run, check, folder, deadline) for check in wanted}
        outcomes = {name: future.result() for name, future in runs.items()}
        results = [judge(check, outcomes) for check in wanted]
        results.append(parity.result())
    for result in results:
        report(f"{'passed' if result.passed else 'FAILED'}  {result.name}: {result.detail} ({result.seconds:.0f} s)")
    return results


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    curve: Curve
    problem: str
    seconds: float


def run(check: Check, folder: Path, deadline: float) -> Outcome:
    """Train; returns the curve, or the last lines that the program printed."""
    began, directory = time.monotonic(), folder / check.file
    command = [sys.executable, "launch/pretrain.py", "--config", RECIPE, *SHAPE, *check.words.split()]
    problem = complete([*command, f"run.directory={directory}"], folder / f"{check.file}.log", deadline)
    metrics = directory / "metrics.jsonl"
    curve = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    return Outcome(curve, problem, time.monotonic() - began)


def complete(command: list[str], log: Path, deadline: float) -> str:
    """Run a program to its end; returns an empty text if all went well, else the exit code and the last lines it printed."""
    with log.open("wb") as output:
        try:
            left = max(1.0, deadline - time.monotonic())
            code = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=left).returncode
        except subprocess.TimeoutExpired:
            return "out of time"
    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
    return "" if code == 0 else f"exit code {code}: {' / '.join(last)[-400:]}"


def judge(check: Check, outcomes: dict[str, Outcome]) -> Result:
    """Whether the curve of a check is right."""
    own = outcomes[check.name]
    if own.problem or len(own.curve) != NUM_STEPS:
        return Result(check.name, False, own.problem or f"{len(own.curve)} steps were recorded", own.seconds)
    if check.name == SCALED:
        passed, detail = settles(own.curve)
    elif check.like:
        passed, detail = follows(own.curve, outcomes[check.like].curve)
    else:
        passed, detail = learns(own.curve)
    return Result(check.name, passed, detail, own.seconds)


def follows(curve: Curve, other: Curve) -> tuple[bool, str]:
    """Whether losses and gradient norms are the same up to rounding."""
    if len(other) != len(curve):
        return False, "the run to compare with failed"
    loss = max(abs(a["loss"] - b["loss"]) for a, b in zip(curve, other, strict=True))
    norm = max(abs(a["gradient_norm"] / b["gradient_norm"] - 1) for a, b in zip(curve, other, strict=True))
    return loss <= MOST_LOSS and norm <= MOST_NORM, f"loss within {loss:.4f}, gradient norm within {norm:.1%}"


def learns(curve: Curve) -> tuple[bool, str]:
    """Whether the loss starts at that of a random guess and falls."""
    first, last = curve[0]["loss"], curve[-1]["loss"]
    return abs(first - math.log(8192)) < 0.2 and last < first - 0.1, f"loss {first:.3f} to {last:.3f}"


def settles(curve: Curve) -> tuple[bool, str]:
    """Whether fp16's scale falls by skipped steps until steps are applied, and the loss then falls."""
    skipped, scale = int(curve[-1]["skipped_steps"]), curve[-1]["loss_scale"]
    settled = skipped == curve[-5]["skipped_steps"] and 0 < skipped < NUM_STEPS - 5 and scale < curve[0]["loss_scale"]
    detail = f"{skipped} steps skipped, scale {curve[0]['loss_scale']:g} to {scale:g}, loss to {curve[-1]['loss']:.3f}"
    return settled and curve[-1]["loss"] < curve[0]["loss"], detail


def run_parity(gpu: bool, folder: Path, deadline: float) -> Result:
    """Run `dsllm parity`: each combination compared with plain PyTorch."""
    began = time.monotonic()
    command = [sys.executable, "-m", "dsllm", "parity", "--world-sizes", "1"]
    only = [] if gpu else ["--quick", "--only", "fp32"]
    log = folder / "parity.log"
    problem = complete([*command, *only, "--json", str(folder / "parity.json")], log, deadline)
    detail = problem or log.read_text().strip().splitlines()[-1]
    return Result("dsllm parity, 1 rank", not problem, detail, time.monotonic() - began)
