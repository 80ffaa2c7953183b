"""The table for people and for programs: markdown for docs/parity.md, JSON, and a summary by precision."""

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from dsllm.parity.compare import Row
from dsllm.parity.pairwise import FACTORS
from dsllm.parity.table import Selection


@dataclass(frozen=True, kw_only=True)
class Report:
    """A table that has been run."""

    selection: Selection
    rows: tuple[Row, ...]
    command: str
    seconds: float
    seed: int

    @property
    def passed(self) -> bool:
        """Every selected row was run, and is within its bounds."""
        return len(self.rows) == len(self.selection.combinations) and all(row.passed for row in self.rows)

    @property
    def machine(self) -> str:
        """The device and the versions that the numbers come from."""
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
        return f"{self.selection.device}, Python {platform.python_version()}, {versions}"


def worst_by_precision(rows: Sequence[Row]) -> list[tuple[str, int, Row]]:
    """For each precision: the number of rows, and the row nearest to its bound."""
    found: list[tuple[str, int, Row]] = []
    for precision in dict.fromkeys(row.combination.precision for row in rows):
        own = [row for row in rows if row.combination.precision == precision]
        found.append((precision, len(own), max(own, key=lambda row: (not row.passed, row.ratio))))
    return found


def as_json(report: Report) -> dict[str, Any]:
    """Everything, for programs. Numbers that are not finite are null."""
    rows = [row.as_dict() for row in report.rows]
    for row in rows:
        row["deviations"] = {k: v if math.isfinite(v) else None for k, v in row["deviations"].items()}
    return {
        "passed": report.passed,
        "machine": report.machine,
        "command": report.command,
        "seed": report.seed,
        "seconds": round(report.seconds, 1),
        "left_out": list(report.selection.left_out),
        "rows": rows,
    }


def cells(row: Row) -> tuple[str, ...]:
    """A row's numbers as text: each deviation with its bound, and the result."""
    pairs = ((row.loss, row.bounds.loss), (row.norm, row.bounds.norm), (row.weights, row.bounds.weights))
    return (*(f"{deviation:.1e} / {bound:.1e}" for deviation, bound in pairs), outcome(row))


def outcome(row: Row) -> str:
    """Whether a row passed, or what is wrong with it."""
    if row.problem:
        return f"FAILED: {row.problem.strip().splitlines()[-1]}"
    return f"{'passed' if row.passed else 'FAILED'}, {row.ratio:.2f} of its bound"


HEAD = ("loss", "gradient norm", "weights", "result")

PAGE = """# Parity

Every row below trains a small model through dsllm's engine, on real ranks, and through a plain single-process PyTorch
loop on the same samples, and compares losses, gradient norms and final weights. Written by

    {command}

{outcome} {machine}; {seconds:.0f} s; samples and initial weights from seed {seed}.

How to read it: each cell is *largest deviation / bound*, all relative; weights are measured by
||w - w_ref|| / ||w_ref - w_initial||. The bounds are derived in `dsllm/parity/bounds.py`; planted faults that must exceed
them are in `tests/parity/test_faults.py`. Rows are named by what they set; `zero2 bf16 ranks=4` is ZeRO stage 2 in bf16 on
four ranks. fp16 rows{fp16} compute in fp16 wherever they run; `dsllm train` refuses fp16 on CPU because it is slow there.

## Nearest to the bound

{worst}
{left_out}
## Which row covers a run

`dsllm/parity/covering_rows.py` answers it for any DeepSpeed JSON. The full product: every ZeRO stage x precision x
accumulation (1 and more) x clipping (on, off) x 1, 2 and 4 ranks that the config accepts. The pairwise rows: every pair of
values of the following factors that can be combined, with stage and precision as one factor, so that each value meets
every stage in every precision.

{factors}

Settings that no row has, and why:

{without_rows}

All other keys of DeepSpeed are refused when the config is read, by name and with the reason
(`dsllm/engine/settings/table.py`).

## All rows

{rows}
"""


def as_markdown(report: Report, without_rows: Sequence[tuple[str, str]]) -> str:
    """docs/parity.md.

    Args:
        without_rows: accepted settings that no row has, each with the reason.
    """
    good = f"All {len(report.rows)} combinations passed." if report.passed else "**Not all combinations passed.**"
    lines = [f"| {precision} | {number} | {row.combination.name} | {' | '.join(cells(row))} |"
             for precision, number, row in worst_by_precision(report.rows)]  # fmt: skip
    left_out = [f"Not run: {text}." for text in report.selection.left_out]
    rows = [f"| {row.combination.name} | {' | '.join(cells(row))} |" for row in report.rows]
    return PAGE.format(
        command=report.command,
        outcome=good,
        machine=report.machine,
        seconds=report.seconds,
        seed=report.seed,
        fp16=" (on this machine on the CPU)" if report.selection.device == "cpu" else "",
        worst="\n".join([_head("precision", "rows", "row", *HEAD), *lines]),
        left_out="\n".join(["", *left_out, ""]) if left_out else "",
        factors="\n".join(
            f"- {name}: {', '.join(_shown(v) for v in values if v is not None)}" for name, values in FACTORS.items()
        ),
        without_rows="\n".join(f"- `{name}`: {reason}" for name, reason in without_rows),
        rows="\n".join([_head("row", *HEAD), *rows]),
    )


def _head(*names: str) -> str:
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def _shown(value: Any) -> str:
    return f"stage {value[0]} {value[1]}" if isinstance(value, tuple) else str(value)
