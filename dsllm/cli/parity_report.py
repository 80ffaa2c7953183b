"""Runs the parity table with a progress bar, and shows its result on the terminal."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dsllm.parity.compare import Row
from dsllm.parity.report import HEAD, Report, cells, outcome, worst_by_precision
from dsllm.parity.table import Selection, run_table


def run_with_progress(selection: Selection, seed: int, console: Console) -> list[Row]:
    """Run all rows; a bar on a terminal, and a line for each row that fails."""
    rows: list[Row] = []
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("parity", total=len(selection.combinations))
        for row in run_table(selection.combinations, selection.device, seed):
            rows.append(row)
            if not row.passed:
                progress.console.print(f"{row.combination.name}: {outcome(row)}", style="red", highlight=False)
            progress.update(task, advance=1, description=f"parity, {row.combination.world_size} ranks")
    return rows


def show(report: Report, console: Console) -> None:
    """Print the rows nearest to their bounds, the failures in full, and a summary in one line."""
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
