"""dsllm prepare: text to tokenizer, token shards and data card."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from dsllm.config.load import load_run
from dsllm.errors import EXIT_INTERRUPTED
from dsllm.prepare.pipeline import prepare
from dsllm.prepare.reading import Progress as TellProgress
from dsllm.prepare.workspace import CARD_FILE

_REDRAW_SECONDS = 0.1


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code.

    Raises:
        DsllmError: the config, a source or the tokenizer cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="dsllm prepare",
        description="Turn a run's sources into a tokenizer, token shards and a data card, in data.directory.",
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="the run's YAML file; none: the embedded recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="sets a field, e.g. data.num_workers=8")
    parser.add_argument("--force", action="store_true", help="prepare again, replacing what data.directory holds")
    options = parser.parse_intermixed_args(arguments)
    words = [*([options.config] if options.config else []), *options.overrides]
    path = words.pop(0) if words and "=" not in words[0] else None
    config = load_run(path, words)
    directory = Path(config.data.directory or f"data/{config.run.name}")
    console = Console()
    try:
        with Progress(*_columns(), console=console, transient=True, disable=not console.is_terminal) as bars:
            prepare(config, directory, _printing(console), _drawing(bars), options.force)
    except KeyboardInterrupt:
        print("interrupted: start the same command again to go on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    print_card(json.loads((directory / CARD_FILE).read_text(encoding="utf-8")), console)
    _printing(console)(f"Prepared in {directory}; all figures in {directory / CARD_FILE}")
    return 0


def print_card(card: dict[str, Any], console: Console) -> None:
    """A data card for people: a table of sources and splits, what was dropped, the tokenizer, and what to beat."""
    say = _printing(console)
    table = Table(title="Prepared data", title_justify="left")
    for column in ("source", "split", "documents", "MB", "tokens", "bytes/token", "shards"):
        table.add_column(column, justify="left" if column in ("source", "split") else "right")
    for source in card["sources"]:
        for split, shown in (("train", "train"), ("validation", "held out")):
            table.add_row(source["name"] if split == "train" else "", shown, *_figures(source[split]))
    if len(card["sources"]) > 1:
        for split, shown in (("train", "train"), ("validation", "held out")):
            table.add_row("all" if split == "train" else "", shown, *_figures(card["splits"][split]))
    console.print(table)
    for source in card["sources"]:
        for line in _what_was_dropped(source):
            say(f"{source['name']}: {line}")
    for line in _verdicts(card):
        say(line)


def _figures(part: dict[str, Any]) -> list[str]:
    """A split's row of the table; what is not known is a dash."""
    ratio = part["bytes_per_token"]
    return [
        f"{part['documents']:,}",
        "-" if part["bytes"] is None else _megabytes(part["bytes"]),
        f"{part['tokens']:,}",
        "-" if ratio is None else f"{ratio:.2f}",
        f"{part['shards']:,}",
    ]


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f}" if num_bytes >= 1e5 else f"{num_bytes / 1e6:.4f}"


def _what_was_dropped(source: dict[str, Any]) -> list[str]:
    """Where the documents went that were read and are not in the table."""
    read = source.get("read")
    if read is None:
        return ["finished token shards, used where they lie"]
    lines = [
        f"{read['documents']:,} read = {read['kept']:,} kept + {read['duplicates']:,} duplicates "
        f"+ {read['empty']:,} empty + {read['bad']:,} bad"
    ]
    for reason, count in read["bad_by_reason"].items():
        lines.append(f"skipped {count:,}: {reason}; for example {read['bad_examples'][reason][0]}")
    if read["ignored_files_by_suffix"]:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in read["ignored_files_by_suffix"].items())
        lines.append(f"files of other types beside them, not read: {kinds}")
    if read["cut_at_megabytes"] is not None:
        lines.append(f"stopped at max_megabytes {read['cut_at_megabytes']:g}; there is more")
    return lines


def _verdicts(card: dict[str, Any]) -> list[str]:
    """The tokenizer's and the baselines' figures in words."""
    tokenizer, baselines = card["tokenizer"], card["baselines"]
    ratio = tokenizer["held_out_bytes_per_token"]
    held_out = f", {ratio:.2f} bytes per token on held-out text" if ratio else ""
    lines = [f"tokenizer: {tokenizer['kind']}, {tokenizer['vocab_size']:,} tokens{held_out}"]
    failures = tokenizer["held_out_documents_not_round_trip"]
    if failures:
        lines.append(f"tokenizer: {failures:,} held-out documents are not the same after encoding and decoding")
    if baselines:
        size = f"{_megabytes(baselines['num_bytes'])} MB" + ("" if baselines["complete"] else ", the first part of it")
        lines.append(
            f"bits per byte of the held-out text ({size}): xz -9 {baselines['xz_9_bits_per_byte']:.3f}, "
            f"gzip -9 {baselines['gzip_9_bits_per_byte']:.3f}, byte unigram {baselines['unigram_bits_per_byte']:.3f}"
        )
    return lines


def _printing(console: Console) -> Any:
    """Prints lines as they are: uncoloured, unwrapped, brackets and all."""
    return lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)


def _columns() -> list[ProgressColumn]:
    amount = TextColumn("{task.completed:,.1f} MB")
    return [TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn()]


def _drawing(bars: Progress) -> TellProgress:
    """Draws one bar for each thing that is done, redrawn a few times a second."""
    tasks: dict[str, TaskID] = {}
    drawn = 0.0

    def tell(what: str, done: float, total: float | None) -> None:
        nonlocal drawn
        if bars.disable or (what in tasks and done != total and time.monotonic() - drawn < _REDRAW_SECONDS):
            return
        drawn = time.monotonic()
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)

    return tell
