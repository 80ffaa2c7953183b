"""Turns what a bench has measured into tables of RESULTS.md, and writes both to the disk."""

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.candidates import BARS, ROOT
from bench.intervals import median_interval, ratios

PAGE = ROOT / "bench" / "RESULTS.md"


def keep(name: str, record: dict[str, Any], parts: Mapping[str, str], into_page: bool) -> None:
    """Print the tables, write the raw numbers to bench/results and, with --write, the tables into RESULTS.md.

    Args:
        parts: name of a part of the bench -> its table; each part has its own place in the page
    """
    folder = ROOT / "bench" / "results"
    folder.mkdir(exist_ok=True)
    file = folder / time.strftime(f"{name}-%Y%m%d-%H%M%S.json")
    file.write_text(json.dumps(record, indent=1) + "\n")
    for part, text in parts.items():
        print(f"{text}\n")
        if into_page:
            write(text, name, PAGE, part)
    print(f"raw numbers: {file.relative_to(ROOT)}")


def marks(name: str, part: str = "") -> tuple[str, str]:
    """The two lines of the page between which a bench, or a part of it, writes."""
    whose = f"{name}: {part}" if part else name
    return f"<!-- {whose}: begin (written by python -m bench.{name} --write) -->", f"<!-- {whose}: end -->"


def write(text: str, name: str, page: Path, part: str = "") -> None:
    """Write a table between its marks in the page."""
    begin, end = marks(name, part)
    before, found_begin, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    assert found_begin and found_end, f"{page} has no place for {name} {part}"
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def conditions(about: dict[str, Any]) -> str:
    """When, and on which machine, the numbers were measured, as a sentence."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    hardware = f"{about['cores']} cores ({about['cpu']}), {about['memory_gib']} GiB"
    return f"{about['date']}, {hardware}; Python {about['python']}, {versions}."


def throughput(record: dict[str, Any]) -> dict[str, str]:
    """For each group, the table of what was measured, and below it the ratios to reach."""
    tables = {}
    for name, group in record["groups"].items():
        lines = [*_group(name, group, record["base"]), "", conditions(record["machine"])]
        if bars := _bars(name, group["measured"]):
            lines += ["", "| to be reached | against | at least | measured | |", "|---|---|---|---|---|", *bars]
        tables[name] = "\n".join(lines)
    return tables


def _group(name: str, group: dict[str, Any], base_name: str) -> list[str]:
    measured = group["measured"]
    base = next(m for m in measured if m["name"] == base_name)
    return [
        f"**Workload {name}**, medians of {len(base['step_seconds'])} rounds and {len(base['start_seconds'])} starts",
        "",
        "| | ratio | 95 % interval | tokens/s | peak GiB per process | command to first step, s |",
        "|---|---|---|---|---|---|",
        *(_row(m, base, group["tokens_per_step"]) for m in measured),
    ]


def _row(measured: dict[str, Any], base: dict[str, Any], tokens_per_step: int) -> str:
    if measured["failure"] or not measured["step_seconds"]:
        return f"| {measured['name']} | failed | | | | |"
    ratio = ratios(base["step_seconds"], measured["step_seconds"])
    low, high = median_interval(ratio)
    speed = tokens_per_step / statistics.median(measured["step_seconds"])
    name = f"**{measured['name']}**" if measured["name"].startswith("dsllm") else measured["name"]
    return (
        f"| {name} | {statistics.median(ratio):.2f} | {low:.2f} to {high:.2f} | {speed:,.0f} "
        f"| {measured['peak_memory_gib']:.2f} | {statistics.median(measured['start_seconds']):.1f} |"
    )


def _bars(group: str, measured: list[dict[str, Any]]) -> list[str]:
    seconds = {m["name"]: m["step_seconds"] for m in measured if m["step_seconds"]}
    lines = []
    for bar in BARS:
        if bar.group == group and bar.candidate in seconds and bar.against in seconds:
            ratio = statistics.median(ratios(seconds[bar.against], seconds[bar.candidate]))
            outcome = "reached" if ratio >= bar.at_least else "**missed**"
            lines.append(f"| {bar.candidate} | {bar.against} | {bar.at_least} | {ratio:.2f} | {outcome} |")
    return lines
