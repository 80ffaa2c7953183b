"""What the engine costs: training with dsllm compared with a plain loop over the same model, in paired steps.

    python -m bench.overhead [--rounds 40] [--write]

Both have the same weights, micro-batch, clipping, fused AdamW and allocator settings. dsllm also does everything else that
belongs to a run: it reads its data, agrees with the other ranks, and writes its metrics.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict

from bench import report
from bench.candidates import GROUPS, ONE_PROCESS, OWN_MODEL, TWO_RANKS
from bench.intervals import median_interval
from bench.rounds import Measured, machine, measure
from bench.throughput import prepare_data

MOST_PERCENT = {
    (ONE_PROCESS, "dsllm, ZeRO-1"): 3.0,
    (TWO_RANKS, "dsllm, ZeRO-1"): 8.0,
    (TWO_RANKS, "dsllm, ZeRO-2"): 8.0,
}
"""The upper end of the interval may not be above this, by group and candidate."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="paired steps")
    parser.add_argument("--group", default="", help=f"only the one with this in its name: {ONE_PROCESS}; {TWO_RANKS}")
    parser.add_argument("--write", action="store_true", help="put the table into bench/RESULTS.md")
    options = parser.parse_args()
    prepare_data()
    names = (OWN_MODEL, "dsllm, ZeRO-0", "dsllm, ZeRO-1", "dsllm, ZeRO-2")
    found = {
        group: measure(GROUPS[group][1], options.rounds, wanted=lambda name: name in names)
        for group in (ONE_PROCESS, TWO_RANKS)
        if options.group in group
    }
    record = {"machine": machine(), "groups": {name: [asdict(m) for m in group] for name, group in found.items()}}
    about = report.conditions(record["machine"])
    tables = {group: "\n".join([*table(group, measured), "", about]) for group, measured in found.items()}
    report.keep("overhead", record, tables, options.write)
    return 0


def table(group: str, measured: Sequence[Measured]) -> list[str]:
    """A row for each ZeRO stage, against the group's plain loop."""
    plain, *engines = measured
    rows = [f"| {group} | more time per step | 95 % interval of the median | paired steps |", "|---|---|---|---|"]
    for engine in engines:
        if not engine.step_seconds or not plain.step_seconds:
            rows.append(f"| {engine.name} | failed | | |")
            continue
        more = percent_more(plain.step_seconds, engine.step_seconds)
        low, high = median_interval(more)
        most = MOST_PERCENT.get((group, engine.name))
        outcome = "" if most is None else f", {'within' if high <= most else '**above**'} {most:g} %"
        middle = f"{statistics.median(more):+.1f} %"
        rows.append(f"| {engine.name} | {middle} | {low:+.1f} to {high:+.1f} %{outcome} | {len(more)} |")
    return rows


def percent_more(plain_seconds: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """By how much each step took longer than the plain loop's step of the same round, in percent."""
    return [100 * (own / plain - 1) for plain, own in zip(plain_seconds, seconds, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
