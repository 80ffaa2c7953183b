"""The parity table itself: a part of it every day, the whole of it as a slow test, with two seeds."""

import math

import pytest

from dsllm.parity.combinations import Combination, full_product
from dsllm.parity.compare import Row
from dsllm.parity.pairwise import pairwise_rows
from dsllm.parity.table import all_combinations, run_table, select_combinations, what_reference_sees

SEEDS = (7, 11)


def everyday() -> list[Combination]:
    """Each stage in each precision once, on 2 ranks with accumulation and clipping."""
    return [c for c in full_product() if (c.world_size, c.accumulation, c.clipping) == (2, 3, True)]


def failures(rows: list[Row]) -> list[str]:
    return [f"{row.combination.name}: {row.ratio:.2f} of its bound {row.problem}" for row in rows if not row.passed]


@pytest.mark.slow
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
    settings = {"gradient_predivide_factor": 2.0, "reduce_scatter": True, "reduce_bucket_size": 99}
    broken = Combination(stage=2, world_size=2, deepspeed=settings)
    first, second = run_table([broken, Combination(world_size=2)], "cpu", SEEDS[0])
    assert not first.passed and "gradient_predivide_factor" in first.problem and math.isinf(first.ratio)
    assert second.passed


def test_a_selection_says_what_it_leaves_out():
    selection = select_combinations([1, 2], quick=True, only="zero1 bf16")
    chosen = selection.combinations
    assert {c.world_size for c in chosen} == {1, 2}
    assert all(c.stage == 1 and c.precision == "bf16" and c in pairwise_rows() for c in chosen)
    assert any("on 4 ranks: not requested" in text for text in selection.left_out)


def test_combinations_that_plain_pytorch_cannot_tell_apart_share_a_reference():
    rows = all_combinations()
    seen = {what_reference_sees(row) for row in rows}
    assert len(seen) < len(rows) / 3
    assert all(what_reference_sees(row) == row for row in seen) and not any(row.deepspeed or row.stage for row in seen)
