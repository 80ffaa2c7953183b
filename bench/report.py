"""From a throughput record to the tables of RESULTS.md."""

import statistics
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- throughput: begin (written by bench/throughput.py --write) -->", "<!-- throughput: end -->"


def ratios(base_seconds: list[float], seconds: list[float]) -> list[float]:
    """Speed against the base, round by round: both did one step in the same short while."""
    return [base / own for base, own in zip(base_seconds, seconds, strict=True)]


def tables(record: dict[str, Any]) -> str:
    """The record as Markdown: one table per group."""
    about = record["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    hardware = f"{about['cores']} cores ({about['cpu']}), {about['memory_gib']} GiB"
    lines = [f"{about['date']}, {hardware}; Python {about['python']}, {versions}."]
    for group, measured in record["groups"].items():
        base = next(m for m in measured if m["name"] == record["base"])
        lines += [
            "",
            f"**{group}**, medians of {len(base['step_seconds'])} rounds and {len(base['start_seconds'])} starts",
            "",
            "| | ratio | quartiles | tokens/s | peak GiB per process | command to first step, s |",
            "|---|---|---|---|---|---|",
        ]
        lines += [row(m, base, record["tokens_per_step"]) for m in measured]
    return "\n".join(lines)


def row(measured: dict[str, Any], base: dict[str, Any], tokens_per_step: int) -> str:
    """One candidate of a table."""
    if measured["failure"] or not measured["step_seconds"]:
        return f"| {measured['name']} | failed | | | | |"
    ratio = ratios(base["step_seconds"], measured["step_seconds"])
    low, _, high = statistics.quantiles(ratio, n=4) if len(ratio) > 1 else (ratio[0],) * 3
    speed = tokens_per_step / statistics.median(measured["step_seconds"])
    name = f"**{measured['name']}**" if measured["name"].startswith("dsllm") else measured["name"]
    return (
        f"| {name} | {statistics.median(ratio):.2f} | {low:.2f} to {high:.2f} | {speed:,.0f} "
        f"| {measured['peak_memory_gib']:.2f} | {statistics.median(measured['start_seconds']):.1f} |"
    )


def write(text: str, page: Path) -> None:
    """Put the tables between their marks in the page."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{page} has no place for the throughput tables"
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
