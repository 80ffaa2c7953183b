"""The GPU bench: correctness, then speed, within a given time. Prints a short table; writes everything as JSON. See run.sh."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.candidates import RECIPE, ROOT
from bench.gpu.checks import Result, run_checks
from bench.gpu.speed import BASE, Measured, run_speed
from bench.rounds import machine, say

CHECKS_SHARE = 0.45
"""Share of the time for the checks, if both parts run."""


def main() -> int:
    options = parse()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    gpu, began = options.device == "cuda", time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="dsllm-gpu-"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))  # equal layers are compiled once
    record: dict[str, Any] = {"ceiling": ceiling(512 if options.tiny else 8192), "machine": machine()}
    prepare = [sys.executable, "-m", "dsllm", "prepare", RECIPE]
    subprocess.run(prepare, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    seconds = 60 * options.minutes - (time.monotonic() - began)
    checks: list[Result] = []
    speeds: list[Measured] = []
    try:
        if options.part != "speed":
            limit = seconds * (CHECKS_SHARE if options.part == "all" else 1)
            checks = run_checks(gpu, folder, limit, say)
            record["parity"] = read_json(folder / "parity.json")
        if options.part != "checks":
            sizes = ["tiny"] if options.tiny else options.sizes.split(",")
            speeds = run_speed(sizes, folder, gpu, seconds - (time.monotonic() - began), say)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    record |= {"checks": [asdict(c) for c in checks], "speed": [asdict(m) for m in speeds]}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
    print(summary(record["ceiling"], checks, speeds))
    wrong = [c.name for c in checks if not c.passed] + [f"{m.size} {m.name}" for m in speeds if m.problem]
    print(f"{time.monotonic() - began:.0f} s; everything: {options.out / 'gpu.json'}")
    print(f"wrong or not run: {'; '.join(wrong)}" if wrong else "all passed")
    return 1 if wrong else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a dry run: a tiny model, few combinations")
    parser.add_argument("--part", choices=("all", "checks", "speed"), default="all")
    parser.add_argument("--sizes", default="125m,350m,1.3b", help="sizes whose speed is measured, by comma")
    parser.add_argument("--minutes", type=float, default=9.5, help="what is not done by then is left out and reported")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "bench" / "results")))
    return parser.parse_args()


def ceiling(size: int) -> dict[str, Any]:
    """What matrix products reach; measured in a process of its own, so that this one does not use the device."""
    command = [sys.executable, "-m", "bench.gpu.ceiling", "--size", str(size)]
    found: dict[str, Any] = json.loads(subprocess.check_output(command, cwd=ROOT, text=True).splitlines()[-1])
    say(f"{found['device']}, torch {found['torch']}: {found['gemm_flops'] / 1e12:.3g} TFLOP/s in matrix products")
    return found


def read_json(file: Path) -> Any:
    """The content of a JSON file; None if the program ended before it wrote the file."""
    return json.loads(file.read_text()) if file.is_file() else None


def summary(about: dict[str, Any], checks: list[Result], speeds: list[Measured]) -> str:
    """The table to read."""
    gemm, sheet = about["gemm_flops"], about["sheet_flops"]
    lines = [
        "",
        f"{about['device']}, torch {about['torch']}; matrix products {gemm / 1e12:.0f} TFLOP/s measured, "
        f"{sheet / 1e12:.0f} by {about['sheet_origin']}",
    ]
    if checks:
        lines.append(f"{sum(c.passed for c in checks)} of {len(checks)} checks passed")
    if speeds:
        lines += ["", "| | | ratio | tokens/s | MFU, measured base | MFU, data sheet | GiB | first step, s |"]
        lines.append("|---|---|---|---|---|---|---|---|")
    base = {m.size: m.tokens_per_second for m in speeds if m.name == BASE}
    for m in sorted(speeds, key=lambda m: list(base).index(m.size) if m.size in base else 0):
        if m.problem:
            lines.append(f"| {m.size} | {m.name} | {m.problem} | | | | | |")
            continue
        ratio = f"{m.tokens_per_second / base[m.size]:.2f}" if base.get(m.size) else ""
        share = f"{m.flops / sheet:.1%}" if sheet else ""
        spread = statistics.quantiles(m.step_seconds, n=4)
        noisy = " (noisy)" if spread[2] > 1.1 * spread[0] else ""
        lines.append(
            f"| {m.size} | {m.name} | {ratio}{noisy} | {m.tokens_per_second:,.0f} | {m.flops / gemm:.1%} | {share} "
            f"| {m.peak_memory_gib:.1f} | {m.start_seconds:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
