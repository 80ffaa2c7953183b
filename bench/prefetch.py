"""What prefetch gains when reading is slow: `dsllm train` with and without it, with a delay before every read of a shard.

    python -m bench.prefetch [--milliseconds 5] [--rounds 3] [--steps 30] [--write]

A small model is trained in one process. Each round runs it without and with prefetch, first with reads as they are, then
with a delay before each read. A small library adds the delay by LD_PRELOAD (bench/slow_reads.c; needs Linux and gcc). The
first steps of a run are left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from bench import report
from bench.candidates import ROOT
from bench.rounds import machine, say

WARM_UP_STEPS = 5
SEQUENCES = 32
"""Sequences per step. Each is one read, or two where it crosses the border of two shards."""

RUN = {
    "run": {"name": "prefetch"},
    "data": {
        "sources": [{"name": "pydocs", "kind": "embedded", "max_megabytes": 1.0}],
        "sequence_length": 128,
        "validation_share": 0.05,
    },
    "tokenizer": {"kind": "byte_bpe", "vocab_size": 1024},
    "model": {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "mlp_size": 352},
    "train": {"global_batch_sequences": SEQUENCES, "micro_batch_sequences": 8, "validate_every_steps": 0},
    "checkpoint": {"every_steps": 0},
    "log": {"every_steps": 1, "tensorboard": False, "breakdown": True},
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The counted steps of one run."""

    milliseconds: float
    """Delay of each read."""
    prefetch: bool
    step_seconds: list[float]
    data_seconds: list[float]
    """The part of each step spent waiting for data."""


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library = build_library(folder)
        (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
        subprocess.run(
            [sys.executable, "-m", "dsllm", "prepare", "run.yaml"], cwd=folder, env=environment(), check=True
        )
        found = [
            measure(folder, library, milliseconds, prefetch, options.steps)
            for _ in range(options.rounds)
            for milliseconds in (0.0, options.milliseconds)
            for prefetch in (False, True)
        ]
    record = {"machine": machine(), "runs": [asdict(one) for one in found]}
    text = "\n".join([*table(found), "", report.conditions(record["machine"])])
    report.keep("prefetch", record, {"": text}, options.write)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--milliseconds", type=float, default=5.0, help="delay of each read in the slow runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="steps of each run that count")
    parser.add_argument("--write", action="store_true", help="put the table into bench/RESULTS.md")
    return parser.parse_args()


def environment(**more: str) -> dict[str, str]:
    """The environment of a run: this one, with the checkout on Python's path."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def build_library(folder: Path) -> Path:
    """Compile bench/slow_reads.c."""
    library = folder / "slow_reads.so"
    source = ROOT / "bench" / "slow_reads.c"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def measure(folder: Path, library: Path, milliseconds: float, prefetch: bool, num_steps: int) -> Measured:
    """One run of `launch/pretrain.py`; its times come from its metrics."""
    directory = folder / "runs" / f"{len(list(folder.glob('runs/*')))}"
    tokens = (WARM_UP_STEPS + num_steps) * SEQUENCES * RUN["data"]["sequence_length"]
    words = (f"run.directory={directory}", f"train.total_tokens={tokens}", f"data.prefetch={str(prefetch).lower()}")
    subprocess.run(
        [sys.executable, ROOT / "launch" / "pretrain.py", "--config", "run.yaml", *words],
        cwd=folder,
        env=environment(LD_PRELOAD=str(library), SLOW_READS_MS=str(milliseconds)),
        stdout=subprocess.DEVNULL,
        check=True,
    )
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()][WARM_UP_STEPS:]
    found = Measured(
        milliseconds=milliseconds,
        prefetch=prefetch,
        step_seconds=[row["seconds"] for row in rows],
        data_seconds=[row["data_seconds"] for row in rows],
    )
    say(f"{milliseconds:g} ms, prefetch {prefetch}: {statistics.median(found.step_seconds):.3f} s a step")
    return found


def table(runs: Sequence[Measured]) -> list[str]:
    """A row for each delay: medians over the steps of all rounds, and the ratio of the medians of each round."""
    rows = [
        "| delay of each read | step without prefetch, s | waits for data, s | step with prefetch, s | waits for data, s "
        "| without / with | lowest and highest round | steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for milliseconds in sorted({run.milliseconds for run in runs}):
        plain, ahead = (
            [run for run in runs if run.milliseconds == milliseconds and run.prefetch == on] for on in (False, True)
        )
        ratios = [
            statistics.median(a.step_seconds) / statistics.median(b.step_seconds)
            for a, b in zip(plain, ahead, strict=True)
        ]
        cells = [
            f"{milliseconds:g} ms",
            *(f"{median:.3f}" for group in (plain, ahead) for median in medians(group)),
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            str(sum(len(run.step_seconds) for run in ahead)),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def medians(runs: Sequence[Measured]) -> tuple[float, float]:
    """Median seconds of a step, and of its wait for data, over the steps of some runs."""
    steps = statistics.median(seconds for run in runs for seconds in run.step_seconds)
    return steps, statistics.median(seconds for run in runs for seconds in run.data_seconds)


if __name__ == "__main__":
    sys.exit(main())
