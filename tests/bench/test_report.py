"""Tables of the bench: ratios compare what was measured in the same round."""

from pathlib import Path

import pytest

from bench import recipe, report
from bench.candidates import BASE, GROUPS, ONE_PROCESS, TWO_RANKS


def measured(name: str, seconds: list[float], failure: str = "") -> dict:
    return {
        "name": name,
        "start_seconds": [5.0],
        "step_seconds": seconds,
        "peak_memory_gib": 1.0,
        "failure": failure,
    }


def record() -> dict:
    machine = {"date": "2026-01-01", "cpu": "a CPU", "cores": 2, "memory_gib": 8, "python": "3.11", "versions": {}}
    # the middle round was slow for both, as when another program runs: twice as fast in every round stays twice as fast
    group = [
        measured(BASE, [2.0, 8.0, 2.0]),
        measured("dsllm, ZeRO-0", [1.0, 4.0, 1.0]),
        measured("dsllm, ZeRO-1", [2.0, 8.0, 2.0]),
        measured("other", [], "it fell"),
    ]
    return {"machine": machine, "base": BASE, "groups": {ONE_PROCESS: {"tokens_per_step": 2048, "measured": group}}}


def test_other_load_cancels_out() -> None:
    rows = report.throughput(record())[ONE_PROCESS].splitlines()
    assert "| **dsllm, ZeRO-0** | 2.00 | 2.00 to 2.00 | 2,048 | 1.00 | 5.0 |" in rows
    assert "| other | failed | | | | |" in rows


def test_what_was_to_be_reached_is_judged() -> None:
    rows = report.throughput(record())[ONE_PROCESS].splitlines()
    assert f"| dsllm, ZeRO-0 | {BASE} | 1.4 | 2.00 | reached |" in rows
    assert f"| dsllm, ZeRO-1 | {BASE} | 1.4 | 1.00 | **missed** |" in rows


def test_tables_take_their_place_and_leave_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    begin, end = report.marks("throughput", "a")
    other = "\n".join(report.marks("throughput", "a, compiled"))
    page.write_text(f"# Measured\n{other}\n{begin}\nold\n{end}\nother results\n")
    report.write("new", "throughput", page, "a")
    report.write("newer", "throughput", page, "a")
    assert page.read_text() == f"# Measured\n{other}\n{begin}\nnewer\n{end}\nother results\n"


def test_a_page_without_the_place_is_not_touched(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text("something else")
    with pytest.raises(AssertionError, match="no place"):
        report.write("new", "recipe", page)
    assert page.read_text() == "something else"


PARTS = {
    "throughput": tuple(GROUPS),
    "overhead": (ONE_PROCESS, TWO_RANKS),
    "recipe": tuple(recipe.GROUPS),
    "curves": ("",),
}


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in PARTS.items() for part in parts])
def test_the_page_has_a_place_for_every_table(name: str, part: str) -> None:
    begin, end = report.marks(name, part)
    assert begin in report.PAGE.read_text() and end in report.PAGE.read_text()
