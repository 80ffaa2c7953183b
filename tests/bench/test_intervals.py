"""The statistics of paired steps."""

import numpy as np
import pytest

from bench.intervals import median_interval, ratios
from bench.overhead import percent_more


def test_pairs_are_compared_within_their_round() -> None:
    assert ratios([2.0, 8.0, 2.0], [1.0, 4.0, 1.0]) == [2.0, 2.0, 2.0]
    assert percent_more([2.0, 8.0], [2.2, 8.8]) == pytest.approx([10.0, 10.0])
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_an_interval_of_equal_numbers_is_that_number() -> None:
    assert median_interval([1.5] * 9) == (1.5, 1.5)


def test_the_interval_holds_the_true_median_as_often_as_it_says() -> None:
    # 200 draws of 31 numbers: 95 % of the intervals hold 0, give or take three standard errors of 1.5 %, and the
    # percentile bootstrap of a median is known to be a little too wide
    draw = np.random.default_rng(5)
    bounds = [median_interval(draw.normal(size=31), resamples=500) for _ in range(200)]
    held = sum(low <= 0 <= high for low, high in bounds)
    assert 180 <= held <= 199


def test_the_interval_shrinks_with_more_numbers() -> None:
    numbers = np.random.default_rng(6).normal(size=400)
    few, many = median_interval(numbers[:25]), median_interval(numbers)
    assert many[1] - many[0] < 0.5 * (few[1] - few[0])  # as 1 / sqrt(16), with room for luck


def test_one_outlier_does_not_move_it_far() -> None:
    quiet = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.01, 0.99]
    assert median_interval([*quiet, 50.0])[1] < 1.1
