"""A position delivers every sample that is not skipped, once and in order, however the samples are divided into steps."""

import itertools
import json

import pytest

from dsllm.data.position import Position
from dsllm.errors import CheckpointError

LAST = 9
EVERY_SET_OF_SKIPPED = [set(s) for size in range(5) for s in itertools.combinations(range(LAST), size)]
"""All sets of at most 4 of the first 9 samples: ranges at the start, next to each other, and apart."""


def skipping(samples: set[int], start: int = 0) -> Position:
    return Position(start).skipping((n, n + 1) for n in samples)


def test_a_position_without_ranges_counts() -> None:
    assert Position(24).samples(3) == [24, 25, 26]
    assert Position(24).after(8) == Position(32)
    assert Position(24).before(8) == Position(16)


def test_samples_are_those_that_are_not_skipped() -> None:
    for skipped in EVERY_SET_OF_SKIPPED:
        kept = [n for n in range(20) if n not in skipped]
        assert skipping(skipped).samples(15) == kept[:15]


def test_dividing_the_samples_differently_delivers_the_same() -> None:
    for skipped in EVERY_SET_OF_SKIPPED:
        position = skipping(skipped)
        for first, second in itertools.product(range(6), range(6)):
            moved = position.after(first)
            assert position.samples(first) + moved.samples(second) == position.samples(first + second)
            assert moved.after(second) == position.after(first + second)


def test_before_is_the_inverse_of_after() -> None:
    for skipped in EVERY_SET_OF_SKIPPED:
        for num_samples in range(12):
            assert skipping(skipped).after(num_samples).before(num_samples) == skipping(skipped)


def test_equal_deliveries_are_equal_positions() -> None:
    """A position stands at the sample that comes next, never at the start of a range that it will jump."""
    assert Position(5).skipping([(5, 9)]) == Position(9, ((5, 9),)) == Position(4).skipping([(5, 9)]).after(1)


def test_ranges_are_sorted_and_joined() -> None:
    position = Position(2).skipping([(20, 25), (8, 10), (10, 12), (22, 30)])
    assert position.skipped == ((8, 12), (20, 30))
    assert position.skipping([(11, 20)]).skipped == ((8, 30),)
    assert position.skipping(position.skipped) == position


def test_a_run_that_goes_back_keeps_what_it_skipped_and_skips_more() -> None:
    later = Position(0).skipping([(3, 5)]).after(20)
    back = Position(8, ((3, 5),))
    assert back.skipping([*later.skipped, (8, 16)]) == Position(16, ((3, 5), (8, 16)))


@pytest.mark.parametrize("more", [(0, 3), (5, 9), (4, 7)])
def test_delivered_samples_cannot_be_skipped(more: tuple[int, int]) -> None:
    with pytest.raises(AssertionError, match="were delivered"):
        Position(6).skipping([more])


@pytest.mark.parametrize("skipped", [((3, 3),), ((5, 4),), ((1, 3), (3, 5)), ((6, 8), (1, 2)), ((1, 5), (4, 6))])
def test_ranges_that_are_not_in_order_are_a_bug(skipped: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(AssertionError):
        Position(20, skipped)


def test_a_position_inside_a_skipped_range_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="cannot be next"):
        Position(4, ((3, 5),))


def test_it_is_saved_as_plain_numbers_and_read_back() -> None:
    position = Position(7).skipping([(9, 12), (20, 21)])
    assert position.to_dict() == {"next_sample": 7, "skipped": [[9, 12], [20, 21]]}
    assert Position.from_dict(json.loads(json.dumps(position.to_dict())), "file") == position


@pytest.mark.parametrize(
    "saved",
    [
        {"next_sample": "x"},
        {"next_sample": -1},
        {"next_sample": 1, "skipped": [[2]]},
        {"next_sample": 1, "skipped": [[0, 2]]},
        {"next_sample": 1, "other": 2},
    ],
)
def test_a_damaged_position_is_refused_with_its_file(saved: dict) -> None:
    with pytest.raises(CheckpointError, match=r"step-7/manifest\.json: damaged"):
        Position.from_dict(saved, "step-7/manifest.json")
