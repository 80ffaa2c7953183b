"""The pairwise rows: every allowed pair of values meets in one of them, and the config accepts exactly them."""

import itertools

import pytest

from dsllm.parity.combinations import Combination, full_product
from dsllm.parity.pairwise import FACTORS, MODE, allowed, allowed_pairs, as_assignment, as_combination, pairwise_rows
from tests.parity.test_combinations import accepted

ROWS = pairwise_rows()


def test_every_allowed_pair_meets_in_a_row():
    met = {pair for row in ROWS for pair in itertools.combinations(as_assignment(row).items(), 2)}
    pairs = set(allowed_pairs())
    assert len(pairs) > 2000 and pairs <= met


def test_each_value_meets_every_stage_and_precision_that_allow_it():
    rows = [as_assignment(row) for row in ROWS]
    for mode in FACTORS[MODE]:
        for name, values in list(FACTORS.items())[1:]:
            met = {row[name] for row in rows if row[MODE] == mode}
            assert met == {v for v in values if allowed({MODE: mode, name: v})}, (mode, name)


def test_the_rows_are_always_the_same_and_few():
    assert pairwise_rows() == ROWS and len(ROWS) == len(set(ROWS)) < 100


def test_a_row_and_its_assignment_are_inverse():
    assert [as_combination(as_assignment(row)) for row in ROWS] == ROWS


@pytest.mark.parametrize("row", [*full_product(), *ROWS], ids=lambda row: row.place)
def test_the_config_accepts_every_row(row: Combination):
    assert accepted(row)


@pytest.mark.parametrize(
    "name", ["grad_accum_dtype", "communication_data_type", "prescale_gradients", "gradient_predivide_factor"]
)
def test_the_config_refuses_what_the_table_leaves_out(name: str):
    """A value that no row of a stage and precision has is one that a run cannot have there."""
    for mode in FACTORS[MODE]:
        for value in FACTORS[name]:
            if value is None or allowed({MODE: mode, name: value}):
                continue
            row = next(r for r in ROWS if (r.stage, r.precision) == mode)
            row = as_combination(as_assignment(row) | {name: value})
            assert not accepted(row), (mode, name, value)
