"""What each element of the recipe for CPUs gains, by itself and on top of the others; workload (a), in dsllm's engine.

python -m bench.recipe [--rounds 15] [--group NAME] [--write]
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench import report
from bench.candidates import module, torchrun
from bench.intervals import median_interval, ratios
from bench.rounds import Measured, machine, measure
from bench.turns import Candidate

ELEMENTS = {
    "precision": "bf16 inside Linear, not autocast",
    "attention": "block-causal attention, not torch's kernel",
    "allocator": "mallopt",
    "optimizer": "AdamW fused, not one tensor at a time",
    "loss": "loss in chunks, not F.cross_entropy",
}
"""Name in bench/peers/recipe_loop.py -> what is compared with what."""
NONE, ALL, TUNABLES = "none of it", "all of it", "all of it, glibc set by its environment"
GLIBC_TUNABLES = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"mmap_max": 0, "trim_threshold": 2**31 - 1, "top_pad": 256 * 2**20}.items()
)
"""The settings that dsllm/engine/processes/device.py makes by mallopt."""
PROGRAM = "bench.peers.recipe_loop"


def one_process(folder: Path) -> list[Candidate]:
    """One process with two threads: each element by itself, and all but each."""

    def without(*names: str) -> tuple[str, ...]:
        return module(PROGRAM, "--without", ",".join(names))

    tunables = (("GLIBC_TUNABLES", GLIBC_TUNABLES),)
    return [
        Candidate(name=NONE, command=without(*ELEMENTS)),
        Candidate(name=ALL, command=without()),
        Candidate(name=TUNABLES, command=without("allocator"), environment=tunables),
        *(Candidate(name=f"only {name}", command=without(*(ELEMENTS.keys() - {name}))) for name in ELEMENTS),
        *(Candidate(name=f"all but {name}", command=without(name)) for name in ELEMENTS),
    ]


def two_ranks(folder: Path) -> list[Candidate]:
    """What matters on several ranks only: the number of threads, and the collective that reduces the gradients."""
    found = []
    for stage in range(3):
        command = torchrun(2, "-m", PROGRAM, "--zero", str(stage))
        name = f"ZeRO-{stage}"
        found.append(Candidate(name=name, command=command, num_ranks=2, threads_per_rank=1))
        if stage:
            scatter = (*command, "--reduce-scatter")
            found.append(Candidate(name=f"{name}, scatter", command=scatter, num_ranks=2, threads_per_rank=1))
        else:
            found.append(Candidate(name=f"{name}, threads", command=command, num_ranks=2, threads_per_rank=2))
    return found


def elements_table(measured: Sequence[Measured]) -> list[str]:
    """For each element, what it gains by itself, and what it gains on top of all others."""
    seconds = {m.name: m.step_seconds for m in measured}
    lines = ["| one process x 2 threads | alone | 95 % | added to the others | 95 % |", "|---|---|---|---|---|"]
    for name, meaning in ELEMENTS.items():
        alone = gain(seconds[NONE], seconds[f"only {name}"])
        lines.append(f"| {meaning} | {alone} | {gain(seconds[f'all but {name}'], seconds[ALL])} |")
    lines.append(f"| all together | {gain(seconds[NONE], seconds[ALL])} | | |")
    lines.append(f"| mallopt, not GLIBC_TUNABLES, both with all of it | | | {gain(seconds[TUNABLES], seconds[ALL])} |")
    return lines


def ranks_table(measured: Sequence[Measured]) -> list[str]:
    """What the number of threads and the choice of the collective gain on two ranks."""
    seconds = {m.name: m.step_seconds for m in measured}
    lines = ["| 2 ranks | gain | 95 % |", "|---|---|---|"]
    more = gain(seconds["ZeRO-0, threads"], seconds["ZeRO-0"])
    lines.append(f"| threads = cores / ranks, not cores (ZeRO-0) | {more} |")
    for name in ("ZeRO-1", "ZeRO-2"):
        more = gain(seconds[f"{name}, scatter"], seconds[name])
        lines.append(f"| all-reduce, not reduce-scatter ({name}) | {more} |")
    return lines


def gain(before_seconds: Sequence[float], after_seconds: Sequence[float]) -> str:
    """Two cells: the median of the ratio of speeds in paired steps, and its interval."""
    if not before_seconds or not after_seconds:
        return "failed |"
    found = ratios(list(before_seconds), list(after_seconds))
    low, high = median_interval(found)
    return f"{statistics.median(found):.3f} | {low:.3f} to {high:.3f}"


GROUPS = {"one process": (one_process, elements_table), "2 ranks": (two_ranks, ranks_table)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="paired steps")
    parser.add_argument("--group", default="", help=f"only the one with this in its name: {'; '.join(GROUPS)}")
    parser.add_argument("--write", action="store_true", help="put the tables into bench/RESULTS.md")
    options = parser.parse_args()
    record: dict = {"machine": machine(), "groups": {}}
    tables = {}
    for name, (make, table) in GROUPS.items():
        if options.group in name:
            measured = measure(make, options.rounds)
            record["groups"][name] = [asdict(m) for m in measured]
            tables[name] = "\n".join([*table(measured), "", report.conditions(record["machine"])])
    report.keep("recipe", record, tables, options.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
