"""What dsllm prepare shows: a progress bar while it works, and the data card at the end."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from dsllm.cli.terminal import silence
from dsllm.prepare.reading import Progress as ReportProgress

_REDRAW_SECONDS = 0.1


def lines_of_card(card: dict[str, Any]) -> list[Table | str]:
    """A data card to print: sources and splits as a table, what was dropped, the tokenizer, and what a model must beat.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, IndexError: it is not a data card.
    """
    table = Table(title="Prepared data", title_justify="left")
    for column in ("source", "split", "documents", "MB", "tokens", "bytes/token", "shards"):
        table.add_column(column, justify="left" if column in ("source", "split") else "right")
    for source in card["sources"]:
        for split, shown in (("train", "train"), ("validation", "held out")):
            table.add_row(source["name"] if split == "train" else "", shown, *_figures(source[split]))
    if len(card["sources"]) > 1:
        for split, shown in (("train", "train"), ("validation", "held out")):
            table.add_row("all" if split == "train" else "", shown, *_figures(card["splits"][split]))
    dropped = [f"{source['name']}: {line}" for source in card["sources"] for line in _what_was_dropped(source)]
    return [table, *dropped, *_summary(card)]


def _figures(part: dict[str, Any]) -> list[str]:
    """The numbers of a split in its row of the table; a dash where one is not known."""
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
    """The documents that were read and are not in the table, by reason."""
    read = source.get("read")
    if read is None:
        return ["finished token shards, used in place"]
    lines = [
        f"{read['documents']:,} read = {read['kept']:,} kept + {read['duplicates']:,} duplicates "
        f"+ {read['empty']:,} empty + {read['bad']:,} bad"
    ]
    for reason, count in read["bad_by_reason"].items():
        lines.append(f"skipped {count:,}: {reason}; for example {read['bad_examples'][reason][0]}")
    if read["ignored_files_by_suffix"]:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in read["ignored_files_by_suffix"].items())
        lines.append(f"files not read: {kinds}")
    for kind, count in read.get("remarks", {}).items():  # a card of an older version has none
        lines.append(f"{kind}: {count:,}, for example {read['remark_examples'][kind][0]}")
    if read["cut_at_megabytes"] is not None:
        lines.append(f"stopped at max_megabytes {read['cut_at_megabytes']:g}; there is more")
    return lines


def _summary(card: dict[str, Any]) -> list[str]:
    """The figures of the tokenizer and of the baselines, as sentences."""
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


class PatientConsole(Console):
    """A console whose reader may leave (`dsllm prepare | head`): the work continues in silence."""

    def on_broken_pipe(self) -> None:
        """Send what follows nowhere, where rich would end the process."""
        self.quiet = True
        silence()


def printing(console: Console) -> Callable[[str | Table], None]:
    """A function that prints tables, and lines as they are: without colours, line breaks or markup."""

    def show(part: str | Table) -> None:
        try:
            console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))
        except OSError:  # the pipe is closed, or the disk behind it is full
            console.quiet = True
            silence()

    return show


def progress_bars(console: Console) -> Progress:
    """Bars on a terminal, nothing elsewhere."""
    amount = TextColumn("{task.completed:,.1f} MB")
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def drawing(bars: Progress) -> ReportProgress:
    """A function that draws one bar for each stage of the work, a few times a second."""
    tasks: dict[str, TaskID] = {}
    drawn = 0.0

    def draw(what: str, done: float, total: float | None) -> None:
        nonlocal drawn
        if bars.disable or (what in tasks and done != total and time.monotonic() - drawn < _REDRAW_SECONDS):
            return
        drawn = time.monotonic()
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)

    return draw
