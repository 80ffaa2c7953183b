"""The order is a shuffle, differs between epochs and seeds, and gives sources their share to within a few samples."""

import itertools
import math

import numpy as np
import pytest

from dsllm.data.order import POINT_BITS, POINTS, Mixture, SampleOrder, permute

WEIGHTS = [[1.0], [1, 1], [0.5, 0.3, 0.15, 0.05], [1, 0, 3], [1e-9, 1.0], [0.2] * 5]


@pytest.mark.parametrize("size", [*range(1, 40), 97, 127, 128, 129, 1000, 1024, 4099])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permute_stays_inside_sizes_that_no_array_could_hold() -> None:
    for size in (10**12, 2**48 - 1, 2**63 + 3):
        found = {permute(i, size, 7) for i in range(200)}
        assert len(found) == 200 and all(0 <= place < size for place in found)


def test_permutations_of_different_keys_differ() -> None:
    size = 64
    orders = {tuple(permute(i, size, key) for i in range(size)) for key in range(100)}
    assert len(orders) == 100


def test_permute_sends_an_element_anywhere_equally_often() -> None:
    """Pearson's statistic over 7 places has 6 degrees of freedom: above 22.5 once in 1000 for a fair shuffle."""
    size, num_keys = 7, 7000
    for index in range(size):
        counts = np.bincount([permute(index, size, 1000 + key) for key in range(num_keys)], minlength=size)
        assert ((counts - num_keys / size) ** 2 / (num_keys / size)).sum() < 22.5


def test_permute_does_not_keep_neighbours_together() -> None:
    """Two random places in range(n) are n / 3 apart on average; the standard error over n pairs is 0.24 sqrt(n)."""
    size = 2000
    places = np.array([permute(i, size, 5) for i in range(size)])
    distance = np.abs(np.diff(places)).mean()
    assert abs(distance - size / 3) < 5 * 0.24 * math.sqrt(size)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_closed_form_of_the_mixture_equals_counting(weights: list[float]) -> None:
    mixture = Mixture(weights)
    seen = [0] * len(weights)
    for n in range(700):
        assert [mixture.count(source, n) for source in range(len(weights))] == seen
        source, index = mixture.locate(n)
        assert index == seen[source]
        seen[source] += 1


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_source_has_its_share_after_any_number_of_samples(weights: list[float]) -> None:
    """Bejian and Faure 1977: [0, w) has n w of the first n van der Corput points, to within log2(n) / 3 + 1."""
    mixture = Mixture(weights)
    shares = np.array(weights) / sum(weights)
    for n in [*range(1, 300), *range(300, 10**6, 9973), 10**12 + 1]:
        counts = np.array([mixture.count(source, n) for source in range(len(weights))])
        assert np.abs(counts - n * shares).max() <= math.log2(n) / 3 + 1 + n * 2.0**-POINT_BITS


def test_a_source_of_weight_zero_is_never_chosen() -> None:
    assert Mixture([1, 0, 3]).count(1, 10**9) == 0


def test_the_mixture_reaches_its_last_sample() -> None:
    assert sum(Mixture([2, 1]).count(source, POINTS - 1) for source in range(2)) == POINTS - 1


@pytest.mark.parametrize(("sizes", "weights"), [([13], None), ([5, 1, 30], None), ([10, 7], [1.0, 1.0])])
def test_every_block_comes_exactly_once_per_epoch(sizes: list[int], weights: list[float] | None) -> None:
    order = SampleOrder([f"s{i}" for i in range(len(sizes))], sizes, weights, seed=3)
    samples = [order.sample(n) for n in range(6 * sum(sizes))]
    for source, size in enumerate(sizes):
        own = [sample for sample in samples if sample.source == source]
        for epoch, part in itertools.groupby(own, key=lambda sample: sample.epoch):
            blocks = [sample.block for sample in part]
            whole = epoch < own[-1].epoch
            assert sorted(blocks) == list(range(size)) if whole else len(set(blocks)) == len(blocks)
        assert own[-1].epoch >= 3, "several epochs were looked at"


def test_without_weights_sources_share_in_proportion_to_their_sizes_and_are_shuffled_together() -> None:
    order = SampleOrder(["small", "large"], [20, 60], None, seed=1)
    epoch = [order.sample(n).source for n in range(80)]
    assert epoch.count(0) == 20
    assert epoch != sorted(epoch)


def test_epochs_and_seeds_and_equally_large_sources_are_shuffled_differently() -> None:
    def blocks(seed: int, source: int, epoch: int) -> list[int]:
        order = SampleOrder(["a", "b"], [50, 50], [1.0, 1.0], seed)
        samples = [order.sample(n) for n in range(300)]
        return [s.block for s in samples if (s.source, s.epoch) == (source, epoch)]

    orders = [blocks(seed, source, epoch) for seed in (1, 2) for source in (0, 1) for epoch in (0, 1)]
    assert all(len(order) == 50 for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_order_is_fixed_for_good() -> None:
    """A run that resumes after an update must go on in the same order: these numbers may never change."""
    assert [permute(i, 1000, 42) for i in range(8)] == PERMUTED
    order = SampleOrder(["a", "b"], [1000, 10], [0.75, 0.25], seed=1234)
    assert [(s.source, s.epoch, s.block) for s in map(order.sample, range(8))] == SAMPLED


PERMUTED = [551, 633, 913, 421, 130, 502, 830, 132]
SAMPLED = [(0, 0, 80), (0, 0, 66), (0, 0, 291), (1, 0, 3), (0, 0, 980), (0, 0, 474), (0, 0, 315), (1, 0, 9)]
