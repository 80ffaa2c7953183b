"""Tables of the bench: ratios compare what was measured in the same round."""

from pathlib import Path

import pytest

from bench import report


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
    group = [measured("plain", [2.0, 8.0, 2.0]), measured("dsllm", [1.0, 4.0, 1.0]), measured("other", [], "it fell")]
    return {"machine": machine, "tokens_per_step": 2048, "base": "plain", "groups": {"one process": group}}


def test_other_load_cancels_out() -> None:
    assert report.ratios([2.0, 8.0, 2.0], [1.0, 4.0, 1.0]) == [2.0, 2.0, 2.0]
    rows = report.tables(record()).splitlines()
    assert "| **dsllm** | 2.00 | 2.00 to 2.00 | 2,048 | 1.00 | 5.0 |" in rows
    assert "| other | failed | | | | |" in rows


def test_tables_take_their_place_and_leave_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text(f"# Measured\n{report.BEGIN}\nold\n{report.END}\nother results\n")
    report.write("new", page)
    report.write("newer", page)
    assert page.read_text() == f"# Measured\n{report.BEGIN}\nnewer\n{report.END}\nother results\n"


def test_a_page_without_the_place_is_not_touched(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text("something else")
    with pytest.raises(AssertionError, match="no place"):
        report.write("new", page)
    assert page.read_text() == "something else"
