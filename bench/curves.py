"""Do the fast path and the plain path learn alike? 1,000 steps of each, from the same weights on the same data.

    python -m bench.curves [--steps 1000] [--seeds 3] [--write]

Compares dsllm's engine (ZeRO-0, fp32 parameters, bf16 inside the layers) with plain PyTorch loops that have a model of
their own, with autocast and in fp32, by the loss on the same held-out tokens. The difference between two paths at equal
seeds is set against the difference between the seeds of one path. A seed decides the initial weights and the order of
the data.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bench import report
from bench.candidates import ROOT
from bench.rounds import machine, say
from bench.throughput import prepare_data

PATHS = ("dsllm", "autocast", "fp32")
Curves = dict[tuple[str, int], list[float]]
"""Held-out loss at each measured step, by path and seed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the table into bench/RESULTS.md")
    options = parser.parse_args()
    prepare_data()
    jobs = [(path, seed, options.steps) for seed in range(options.seeds) for path in PATHS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # one thread each: small matrices gain little from two
        runs = list(pool.map(lambda job: train(*job), jobs))
    curves = {(run["path"], run["seed"]): run["held_out"] for run in runs}
    record = {"machine": machine(), "runs": runs, "compared": compare(curves)}
    report.keep("curves", record, {"": table(record)}, options.write)
    picture = draw(runs, ROOT / "bench" / "results" / "curves.png")
    print(f"picture: {picture.relative_to(ROOT)}")
    return 0


def train(path: str, seed: int, steps: int) -> dict[str, Any]:
    """One run, in a process of its own."""
    say(f"{path}, seed {seed}")
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        words = ["--path", path, "--seed", str(seed), "--steps", str(steps), "--out", out.name]
        command = [sys.executable, "-m", "bench.peers.curve_loop", *words]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return json.loads(Path(out.name).read_text())


def compare(curves: Curves) -> dict[str, dict[str, float]]:
    """Mean and largest difference of the held-out loss: between paths at equal seeds, and between seeds of one path."""
    seeds = sorted({seed for _, seed in curves})
    compared = {}
    for one, other in itertools.combinations(PATHS, 2):
        compared[f"{one} - {other}, equal seeds"] = difference([(curves[one, s], curves[other, s]) for s in seeds])
    for path in PATHS:
        pairs = [(curves[path, one], curves[path, other]) for one, other in itertools.combinations(seeds, 2)]
        compared[f"{path}, seeds among each other"] = difference(pairs)
    return compared


def difference(pairs: list[tuple[list[float], list[float]]]) -> dict[str, float]:
    """How far pairs of curves are apart: the mean and the largest distance over all measured steps, and the one at the end."""
    distances = np.abs([np.subtract(one, other) for one, other in pairs])
    return {
        "mean": float(distances.mean()),
        "largest": float(distances.max()),
        "at_the_end": float(distances[:, -1].mean()),
    }


def table(record: dict[str, Any]) -> str:
    """The differences, and whether the paths differ less than the seeds."""
    compared = record["compared"]
    lines = [report.conditions(record["machine"]), ""]
    lines += ["| held-out loss, nats | mean difference | largest | at the end |", "|---|---|---|---|"]
    for name, found in compared.items():
        lines.append(f"| {name} | {found['mean']:.4f} | {found['largest']:.4f} | {found['at_the_end']:.4f} |")
    seeds = statistics.mean(found["mean"] for name, found in compared.items() if "among" in name)
    worst = max(found["mean"] for name, found in compared.items() if "equal" in name)
    outcome = "within" if worst <= seeds else "**beyond**"
    lines += [
        "",
        f"The paths differ by at most {worst / seeds:.0%} of what seeds differ by: {outcome} the spread of seeds.",
    ]
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], picture: Path) -> Path:
    """Draw all curves, one colour per path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for run in runs:
        place = PATHS.index(run["path"])
        label = run["path"] if run["seed"] == 0 else None
        axes.plot(run["steps"], run["held_out"], color=f"C{place}", linestyle=("-", "--", ":")[place], label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend()
    figure.savefig(picture, dpi=120, bbox_inches="tight")
    return picture


if __name__ == "__main__":
    sys.exit(main())
