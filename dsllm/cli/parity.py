"""dsllm parity: compares this installation's numbers with plain PyTorch, combination by combination."""

import argparse
import shlex
import sys
import time
from pathlib import Path

from dsllm.cli.output import Report, add_json_option, check_writable, json_report, write_text
from dsllm.errors import EXIT_FAILED, EXIT_FORCED, EXIT_USAGE


def main(arguments: list[str]) -> int:
    """`dsllm parity`, also `dsllm doctor --parity`; returns 0 where every combination is within its bounds."""
    options = _parse(arguments)
    with json_report(options.json) as report:
        return _run(options, shlex.join(["dsllm", "parity", *arguments]), report)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dsllm parity",
        description="Train a small model through the engine and through plain PyTorch on the same samples, in every "
        "combination of settings, and compare losses, gradient norms and final weights. Runs on GPUs where there are any; "
        "takes minutes.",
    )
    parser.add_argument("--quick", action="store_true", help="only the pairwise rows: a third of the table")
    parser.add_argument(
        "--world-sizes", type=_world_sizes, metavar="1,2,4", help="numbers of ranks; default: all of these"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only combinations whose name contains these words")
    parser.add_argument("--seed", type=int, default=7, help="of the samples and the initial weights (default 7)")
    add_json_option(parser, "every row with its deviations and bounds")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table as markdown (docs/parity.md)")
    return parser.parse_args(arguments)


def _world_sizes(text: str) -> list[int]:
    from dsllm.parity.combinations import WORLD_SIZES

    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of numbers such as 1,2") from None
    if unknown := [n for n in numbers if n not in WORLD_SIZES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]} ranks are not in the table: it has {WORLD_SIZES}")
    return numbers


def _run(options: argparse.Namespace, command: str, report: Report) -> int:
    """Run the table and show it; returns the exit code.

    Args:
        command: the command line, for the page
    """
    from rich.console import Console

    from dsllm.cli.parity_report import run_with_progress, show
    from dsllm.parity.combinations import WORLD_SIZES
    from dsllm.parity.covering_rows import settings_without_rows
    from dsllm.parity.report import Report as ParityReport
    from dsllm.parity.report import as_json, as_markdown
    from dsllm.parity.table import select_combinations

    selection = select_combinations(options.world_sizes or WORLD_SIZES, options.quick, options.only)
    if not selection.combinations:
        reason = "; ".join(selection.left_out) or "--only matches none"
        print(f"dsllm parity: no combination to run: {reason}", file=sys.stderr)
        return EXIT_USAGE
    if options.write:
        check_writable(options.write)
    console = Console()
    start = time.monotonic()
    try:
        rows = run_with_progress(selection, options.seed, console)
    except KeyboardInterrupt:
        console.print("interrupted; no rank is left running")
        return EXIT_FORCED
    seconds = time.monotonic() - start
    found = ParityReport(selection=selection, rows=tuple(rows), command=command, seconds=seconds, seed=options.seed)
    show(found, console)
    report(as_json(found))
    if options.write:
        write_text(options.write, as_markdown(found, settings_without_rows()))
    return 0 if found.passed else EXIT_FAILED
