"""A clock that is off is found through the ranks, and the right rank is blamed."""

import time

import pytest

from dsllm.doctor.clocks import Offsets, check_clocks, measure_offsets
from tests.doctor.test_findings import places
from tests.helpers.ranks import run_ranks

SKEW = 7.5


def offsets_on_rank(world, skews) -> Offsets:
    return measure_offsets(world, lambda: time.time() + skews[world.rank])


def test_a_skew_is_measured():
    found = run_ranks(2, offsets_on_rank, (0.0, SKEW))
    assert found[0] == found[1] and found[0].seconds[0] == 0
    # a barrier lets two ranks of one machine go within milliseconds; half a second is for a machine full of other work
    assert found[0].seconds[1] == pytest.approx(SKEW, abs=0.5)
    (advice,) = check_clocks(dict(zip(places("a", "b"), found[0].seconds, strict=True)))
    assert advice.level == "advice" and advice.where == "rank 1 on b" and "s ahead of the others" in advice.problem


def test_one_clock_agrees_with_itself():
    found = run_ranks(2, offsets_on_rank, (0.0, 0.0))[0]
    assert not list(check_clocks(dict(zip(places("a", "b"), found.seconds, strict=True))))


def test_rank_0_is_blamed_where_it_is_the_one():
    (found,) = check_clocks(dict(zip(places("a", "b", "c"), (0.0, 90.0, 90.1), strict=True)))
    assert found.level == "error" and found.where == "rank 0 on a" and "90.0 s behind" in found.problem
