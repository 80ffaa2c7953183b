"""dsllm doctor: checks an installation. `--parity` proves its numbers against plain PyTorch, combination by combination."""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dsllm.errors import EXIT_FAILED, EXIT_USAGE
from dsllm.files import write_atomically
from dsllm.parity.combinations import WORLD_SIZES
from dsllm.parity.compare import Row
from dsllm.parity.coverage import untouched
from dsllm.parity.report import HEAD, Report, as_json, as_markdown, cells, verdict, worst_by_precision
from dsllm.parity.table import Plan, plan_table, run_table

EXIT_CTRL_C = 130


def main(arguments: Sequence[str]) -> int:
    """`dsllm doctor --parity ...`; the exit code: 0 where every combination lies within its bounds."""
    options = _parse(arguments)
    plan = plan_table(options.world_sizes, options.quick, options.only)
    if not plan.combinations:
        print(
            f"dsllm doctor: no combination to run: {'; '.join(plan.left_out) or '--only matches none'}", file=sys.stderr
        )
        return EXIT_USAGE
    console = Console(stderr=options.json == "-")  # stdout is the JSON's
    start = time.monotonic()
    try:
        rows = _run(plan, options.seed, console)
    except KeyboardInterrupt:
        console.print("interrupted; no rank is left running")
        return EXIT_CTRL_C
    report = Report(
        plan=plan,
        rows=tuple(rows),
        command=shlex.join(["dsllm", "doctor", *arguments]),
        seconds=time.monotonic() - start,
        seed=options.seed,
    )
    _show(report, console)
    if options.json:
        text = json.dumps(as_json(report), indent=2) + "\n"
        print(text, end="") if options.json == "-" else write_atomically(Path(options.json), text)
    if options.write:
        write_atomically(options.write, as_markdown(report, untouched()))
    return 0 if report.passed else EXIT_FAILED


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dsllm doctor", description="Check this installation and this machine.")
    parser.add_argument(
        "--parity",
        action="store_true",
        help="train a small model through the engine and through plain PyTorch, in every combination of settings, and "
        "compare; on GPUs where there are any; minutes",
    )
    parser.add_argument("--quick", action="store_true", help="only the pairwise cover: a third of the rows")
    parser.add_argument(
        "--world-sizes", type=_numbers, default=list(WORLD_SIZES), metavar="1,2,4", help="numbers of ranks to run on"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only combinations whose name has these words")
    parser.add_argument("--seed", type=int, default=7, help="of the samples and the initial weights (default 7)")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON; -: to the standard output")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table as markdown (docs/parity.md)")
    options = parser.parse_args(list(arguments))
    if not options.parity:
        parser.error("nothing to check: give --parity")
    return options


def _numbers(text: str) -> list[int]:
    numbers = [int(word) for word in text.split(",")]
    if unknown := [n for n in numbers if n not in WORLD_SIZES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} ranks are not in the table: it has {WORLD_SIZES}")
    return numbers


def _run(plan: Plan, seed: int, console: Console) -> list[Row]:
    """All rows; a bar on a terminal, and a line for each row that failed."""
    rows: list[Row] = []
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        # a row on 4 ranks takes several times as long as one on 1: the estimate counts ranks
        task = progress.add_task("parity", total=len(plan.combinations))
        for row in run_table(plan.combinations, plan.device, seed):
            rows.append(row)
            if not row.passed:
                progress.console.print(f"{row.combination.name}: {verdict(row)}", style="red", highlight=False)
            progress.update(task, advance=1, description=f"parity, {row.combination.world_size} ranks")
    return rows


def _show(report: Report, console: Console) -> None:
    """The rows nearest to their bounds, the failures in full, and one last line."""
    table = Table("precision", "rows", "row nearest to its bound", *HEAD, title=f"Deviation / bound; {report.machine}")
    for precision, number, row in worst_by_precision(report.rows):
        table.add_row(precision, str(number), row.combination.place, *cells(row))
    console.print(table)
    failures = [row for row in report.rows if not row.passed]
    for row in failures:
        console.print(
            f"\n{row.combination.name}\n  {'  '.join(cells(row))}\n{row.problem}", highlight=False, markup=False
        )
    for text in report.plan.left_out:
        console.print(f"not run: {text}", highlight=False)
    passed = len(report.rows) - len(failures)
    console.print(f"{passed} of {len(report.rows)} combinations agree with plain PyTorch, in {report.seconds:.0f} s")
