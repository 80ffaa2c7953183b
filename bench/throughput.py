"""Tokens per second, memory and start-up of dsllm compared with other training loops, all in one run: `make bench`."""

import argparse
import subprocess
import sys
from dataclasses import asdict

from bench import report
from bench.candidates import BASE, GROUPS, RECIPE, ROOT
from bench.rounds import machine, measure
from bench.workloads import WORKLOADS


def main() -> int:
    options = parse()
    prepare_data()
    words = options.only.split(",")
    groups = {}
    for name, (workload, make) in GROUPS.items():
        if options.group not in name:
            continue
        found = measure(make, options.rounds, options.starts, lambda who: who == BASE or any(w in who for w in words))
        tokens = WORKLOADS[workload].tokens_per_step
        groups[name] = {"tokens_per_step": tokens, "measured": [asdict(m) for m in found]}
    record = {"machine": machine(), "base": BASE, "groups": groups}
    report.keep("throughput", record, report.throughput(record), options.write)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="steps of each candidate that count")
    parser.add_argument("--starts", type=int, default=3, help="starts of each candidate that are timed")
    parser.add_argument("--group", default="", help=f"only groups with this in their name: {'; '.join(GROUPS)}")
    parser.add_argument(
        "--only", default="", help="only the base, and names that contain one of these words (by comma)"
    )
    parser.add_argument("--write", action="store_true", help="put the tables into bench/RESULTS.md")
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--write replaces a group's whole table: leave --only out")
    return options


def prepare_data() -> None:
    """Prepare dsllm's token shards before anything is measured, and read the libraries into the file cache."""
    subprocess.run([sys.executable, "-c", "import deepspeed, transformers"], cwd=ROOT, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "dsllm", "prepare", RECIPE], cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
