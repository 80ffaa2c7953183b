"""The table for people and for programs."""

import json
import math

from dsllm.parity.bounds import Bounds
from dsllm.parity.combinations import Combination
from dsllm.parity.compare import Row
from dsllm.parity.report import Report, as_json, as_markdown, worst_by_precision
from dsllm.parity.table import Selection


def row(weights: float, precision="fp32", problem: str = "") -> Row:
    bounds = Bounds(loss=1.0, norm=1.0, weights=1.0)
    combination = Combination(stage=1, precision=precision, deepspeed={"overlap_comm": True})
    return Row(combination=combination, loss=0.1, norm=0.1, weights=weights, bounds=bounds, problem=problem)


def report_of(*rows: Row, selected: int | None = None) -> Report:
    combinations = tuple(r.combination for r in rows) + (Combination(),) * ((selected or len(rows)) - len(rows))
    selection = Selection(combinations=combinations, left_out=("4 ranks: no GPUs",), device="cpu")
    return Report(selection=selection, rows=rows, command="dsllm doctor --parity", seconds=1.0, seed=7)


def test_a_report_passes_when_every_selected_row_was_run_and_passed():
    assert report_of(row(0.5), row(0.2)).passed
    assert not report_of(row(0.5), row(1.5)).passed
    assert not report_of(row(0.5), row(0.5, problem="a step was not applied")).passed
    assert not report_of(row(0.5), selected=2).passed, "a row is missing"


def test_the_page_names_what_failed_what_was_not_run_and_what_no_row_has():
    page = as_markdown(report_of(row(0.5), row(math.nan)), [("steps_per_print", "prints")])
    assert "**Not all combinations passed.**" in page and "FAILED" in page
    assert "Not run: 4 ranks: no GPUs." in page and "- `steps_per_print`: prints" in page
    assert "overlap_comm=True" in page and "- overlap_comm: False, True" in page
    assert "All 1 combinations passed." in as_markdown(report_of(row(0.5)), [])


def test_the_json_has_every_setting_and_null_for_what_is_not_a_number():
    data = json.loads(json.dumps(as_json(report_of(row(0.5), row(math.nan)))))
    assert not data["passed"] and [r["passed"] for r in data["rows"]] == [True, False]
    assert data["rows"][1]["deviations"] == {"loss": 0.1, "norm": 0.1, "weights": None}
    assert data["rows"][0]["combination"]["overlap_comm"] is True
    assert data["rows"][0]["combination"]["reduce_scatter"] is None


def test_the_worst_row_of_a_precision_is_a_failed_one_or_the_nearest_to_its_bound():
    rows = [row(0.5), row(0.9), row(0.1, "bf16"), row(0.1, "bf16", problem="an error")]
    assert worst_by_precision(rows) == [("fp32", 2, rows[1]), ("bf16", 2, rows[3])]
