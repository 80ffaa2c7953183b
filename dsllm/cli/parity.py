"""dsllm doctor --parity: proves this installation's numbers against plain PyTorch, combination by combination."""

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
from dsllm.parity.covering_rows import settings_without_rows
from dsllm.parity.report import HEAD, Report, as_json, as_markdown, cells, verdict, worst_by_precision
from dsllm.parity.table import Selection, run_table, select_combinations

EXIT_CTRL_C = 130


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Run the table and show it; exit code 0: every combination is within its bounds.

    Args:
        options: world_sizes, quick, only, seed, json, write.
        words: the arguments as the user gave them, for the page.
    """
    selection = select_combinations(options.world_sizes or WORLD_SIZES, options.quick, options.only)
    if not selection.combinations:
        print(
            f"dsllm doctor: no combination to run: {'; '.join(selection.left_out) or '--only matches none'}",
            file=sys.stderr,
        )
        return EXIT_USAGE
    console = Console(stderr=options.json == "-")  # stdout is the JSON's
    start = time.monotonic()
    try:
        rows = _run(selection, options.seed, console)
    except KeyboardInterrupt:
        console.print("interrupted; no rank is left running")
        return EXIT_CTRL_C
    report = Report(
        selection=selection,
        rows=tuple(rows),
        command=shlex.join(["dsllm", "doctor", *words]),
        seconds=time.monotonic() - start,
        seed=options.seed,
    )
    _show(report, console)
    if options.json:
        text = json.dumps(as_json(report), indent=2) + "\n"
        print(text, end="") if options.json == "-" else write_atomically(Path(options.json), text)
    if options.write:
        write_atomically(options.write, as_markdown(report, settings_without_rows()))
    return 0 if report.passed else EXIT_FAILED


def _run(selection: Selection, seed: int, console: Console) -> list[Row]:
    """All rows. Shows a progress bar on a terminal, and a line for each row that failed."""
    rows: list[Row] = []
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        # a row on 4 ranks takes several times as long as one on 1: the estimate counts ranks
        task = progress.add_task("parity", total=len(selection.combinations))
        for row in run_table(selection.combinations, selection.device, seed):
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
    for text in report.selection.left_out:
        console.print(f"not run: {text}", highlight=False)
    passed = len(report.rows) - len(failures)
    console.print(f"{passed} of {len(report.rows)} combinations agree with plain PyTorch, in {report.seconds:.0f} s")
