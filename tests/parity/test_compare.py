"""The comparison of what the ranks trained with the reference."""

import dataclasses
import math

import numpy as np

from dsllm.parity.combinations import Combination
from dsllm.parity.compare import Row, compare, failed
from dsllm.parity.engine_run import RankTrained
from dsllm.parity.reference import Reference

WEIGHTS = np.ones(4, np.float32)
REFERENCE = Reference([1.0], [2.0], {"w": WEIGHTS}, 1.0)
RANKS = [RankTrained([1.0], [2.0], [True], [("w", start, WEIGHTS[start : start + 2])]) for start in (0, 2)]


def row_of(*ranks: RankTrained) -> Row:
    return compare(Combination(world_size=2), REFERENCE, ranks)


def second(**fields) -> RankTrained:
    return dataclasses.replace(RANKS[1], **fields)


def test_ranks_that_trained_the_same_pass():
    assert row_of(*RANKS).passed and row_of(*RANKS).ratio == 0.0


def test_ranks_that_differ_or_lose_a_weight_do_not_pass():
    assert "do not make up w" in row_of(RANKS[0]).problem
    assert "do not make up w" in row_of(*RANKS, RANKS[1]).problem
    assert "different losses or norms" in row_of(RANKS[0], second(losses=[1.5])).problem
    assert "different losses or norms" in row_of(RANKS[0], second(applied=[False])).problem
    unapplied = [dataclasses.replace(rank, applied=[False]) for rank in RANKS]
    assert row_of(*unapplied).problem == "step 0 was not applied"


def test_deviations_are_relative():
    off = [("w", 2, WEIGHTS[2:] + np.float32(0.5))]
    row = row_of(RANKS[0], second(pieces=off))
    assert math.isclose(row.weights, 0.5 * math.sqrt(2)) and not row.passed  # the way is 1
    doubled = [dataclasses.replace(rank, losses=[1.5], norms=[3.0]) for rank in RANKS]
    assert (row_of(*doubled).loss, row_of(*doubled).norm) == (0.5, 0.5)


def test_a_number_that_is_not_one_never_passes():
    for wrong in ({"losses": [math.nan]}, {"norms": [math.nan]}):
        row = row_of(*(dataclasses.replace(rank, **wrong) for rank in RANKS))
        assert not row.passed and row.ratio == math.inf


def test_a_combination_that_stopped_is_a_row_that_failed():
    row = failed(Combination(), REFERENCE, "it stopped")
    assert not row.passed and row.problem == "it stopped" and row.ratio == math.inf
