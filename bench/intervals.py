"""Ratios of paired times, and the interval in which their median is."""

from collections.abc import Sequence

import numpy as np


def ratios(base_seconds: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """Speed as a ratio to the base, round by round: in a round both take one step shortly after each other."""
    return [base / own for base, own in zip(base_seconds, seconds, strict=True)]


def median_interval(values: Sequence[float], level: float = 0.95, resamples: int = 10_000) -> tuple[float, float]:
    """Bootstrapped interval of the median: percentiles of the medians of samples drawn with replacement (Efron 1979)."""
    numbers = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(1234).integers(len(numbers), size=(resamples, len(numbers)))
    medians = np.median(numbers[drawn], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
