"""The parity table itself: a part of it every day, the whole of it as a slow test, with two seeds."""

import dataclasses
import math

import numpy as np
import pytest
from dsllm.parity.cover import pairwise_cover

from dsllm.parity.combinations import Combination, full_product
from dsllm.parity.compare import Row, compare
from dsllm.parity.engine_run import RankTrained
from dsllm.parity.report import Report, as_json, as_markdown, worst_by_precision
from dsllm.parity.table import Plan, all_combinations, plan_table, run_table

SEEDS = (7, 11)


def everyday() -> list[Combination]:
    """Each stage in each precision once, on 2 ranks with accumulation and clipping."""
    return [c for c in full_product() if (c.world_size, c.accumulation, c.clipping) == (2, 3, True)]


def failures(rows: list[Row]) -> list[str]:
    return [f"{row.combination.name}: {row.ratio:.2f} of its bound {row.problem}" for row in rows if not row.passed]


def test_every_stage_and_precision_agrees_with_plain_pytorch():
    rows = list(run_table(everyday(), "cpu", SEEDS[0]))
    assert len(rows) == 15 and not failures(rows)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_whole_table(seed: int):
    rows = list(run_table(all_combinations(), "cpu", seed))
    assert len(rows) == len(all_combinations()) > 250 and not failures(rows)
    # the bounds are not passed by luck: the nearest row keeps a distance
    assert max(row.ratio for row in rows) < 0.8


def test_an_error_of_one_combination_is_its_row_and_the_next_one_runs():
    broken = Combination(
        stage=2, world_size=2, gradient_predivide_factor=2.0, reduce_scatter=True, reduce_bucket_size=99
    )
    first, second = run_table([broken, Combination(world_size=2)], "cpu", SEEDS[0])
    assert not first.passed and "gradient_predivide_factor" in first.problem and math.isinf(first.ratio)
    assert second.passed


@pytest.fixture(scope="module")
def one() -> Row:
    return next(run_table([Combination()], "cpu", SEEDS[0]))


def test_the_page_and_the_json_name_what_failed(one: Row):
    bad = dataclasses.replace(one, weights=math.nan)
    plan = Plan(combinations=(one.combination, bad.combination), left_out=("4 ranks: no GPUs",), device="cpu")
    report = Report(plan=plan, rows=(one, bad), command="dsllm doctor --parity", seconds=1.0, seed=7)
    page, data = as_markdown(report, [("steps_per_print", "prints")]), as_json(report)
    assert not report.passed and not data["passed"] and data["rows"][1]["deviations"]["weights"] is None
    assert "**Not all" in page and "FAILED" in page and "4 ranks: no GPUs" in page and "steps_per_print" in page
    assert worst_by_precision(report.rows)[0][2] is bad
    assert not dataclasses.replace(report, rows=(one,)).passed, "a row is missing"


def test_ranks_that_differ_or_lose_a_weight_do_not_pass(one: Row):
    from dsllm.parity.reference import Reference

    weights = {"w": np.ones(4, np.float32)}
    reference = Reference([1.0], [2.0], weights, 1.0)
    halves = [("w", 0, weights["w"][:2])], [("w", 2, weights["w"][2:])]
    ranks = [RankTrained([1.0], [2.0], [True], pieces) for pieces in halves]
    assert compare(one.combination, reference, ranks).passed
    assert not compare(one.combination, reference, ranks[:1]).passed
    assert not compare(one.combination, reference, [ranks[0], dataclasses.replace(ranks[1], losses=[1.5])]).passed
    assert not compare(one.combination, reference, [ranks[0], dataclasses.replace(ranks[1], applied=[False])]).passed


def test_a_plan_says_what_it_leaves_out():
    plan = plan_table([1, 2], quick=True, only="zero1 bf16")
    assert {c.world_size for c in plan.combinations} == {1, 2}
    assert all(c.stage == 1 and c.precision == "bf16" and c in pairwise_cover() for c in plan.combinations)
    assert any("on 4 ranks: not asked for" in text for text in plan.left_out)
