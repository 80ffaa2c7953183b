"""Which block of which source is sample number n: pure functions, so that no order is built, stored or sent around.

Within a source a keyed permutation shuffles the blocks anew in every epoch. Between sources a low-discrepancy sequence
chooses, so that after any number of samples each source has had its share to within a few samples.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isqrt

MASK64 = 2**64 - 1
GOLDEN64 = 0x9E3779B97F4A7C15
NUM_ROUNDS = 8
POINT_BITS = 48
POINTS = 2**POINT_BITS  # as many samples as a run may have: 2.8e14


def permute(index: int, size: int, key: int) -> int:
    """A keyed shuffle of range(size), one element at a time: constant time and memory for any size up to 2^64.

    A generalised Feistel network over pairs (x, y) with x < a, y < b and a b just above size; a pair that lands beyond
    size goes round again (cycle walking), which hardly one in sqrt(size) does. Black and Rogaway, "Ciphers with
    arbitrary finite domains", CT-RSA 2002, sections 4 and 5.

    Args:
        index: in range(size).
        size: number of elements, at least 1.
        key: 64 bits; another key gives another permutation.
    """
    assert 0 <= index < size, f"element {index} of {size}"
    num_rows = isqrt(size - 1) + 1
    num_columns = -(-size // num_rows)
    while True:
        x, y = divmod(index, num_columns)
        for round_key in range(key, key + NUM_ROUNDS, 2):
            x = (x + _mix(y, round_key)) % num_rows
            y = (y + _mix(x, round_key + 1)) % num_columns
        index = x * num_columns + y
        if index < size:
            return index


def _mix(value: int, key: int) -> int:
    """A 64-bit hash of a number under a key: splitmix64's finaliser (Steele, Lea and Flood 2014), before and after."""
    mixed = (key * GOLDEN64) & MASK64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    mixed = (mixed ^ (mixed >> 27) ^ value) * GOLDEN64 & MASK64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK64
    return mixed ^ (mixed >> 31)


class Mixture:
    """Deterministic choice of a source per sample, in proportion to weights.

    Sample n lies at the van der Corput point u_n (n's bits mirrored behind the point), and takes the source in whose
    part of [0, 1) that is. After n samples a source of weight w has had n w of them, to within log2(n) / 3 + 1
    (Bejian and Faure 1977).
    """

    def __init__(self, weights: Sequence[float]):
        """Weights relative to each other, none negative; a source of weight 0 is never chosen."""
        assert weights and min(weights) >= 0 and sum(weights) > 0, f"weights {weights}"
        total = sum(weights)
        self._bounds = [0, *(round(partial / total * POINTS) for partial in accumulate(weights))]
        self._bounds[-1] = POINTS

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, number of earlier samples of that source) of a sample; O(log sample)."""
        assert 0 <= sample < POINTS, f"sample {sample} of {POINTS}"
        source = bisect_right(self._bounds, _mirror(sample)) - 1
        return source, self._count(source, sample)

    def counts(self, num_samples: int) -> list[int]:
        """How many of the first samples each source has; O(sources x log num_samples)."""
        return [self._count(source, num_samples) for source in range(len(self._bounds) - 1)]

    def _count(self, source: int, num_samples: int) -> int:
        return _points_below(self._bounds[source + 1], num_samples) - _points_below(self._bounds[source], num_samples)


def _mirror(value: int) -> int:
    """The POINT_BITS bits of a number in reverse."""
    return int(f"{value:0{POINT_BITS}b}"[::-1], 2)


def _points_below(bound: int, num_points: int) -> int:
    """How many of the first van der Corput points lie below bound (both in units of 1 / POINTS).

    [0, num_points) is cut into one run of 2^i numbers per binary digit. The numbers of a run share their higher digits,
    so their points are equally spaced: start, start + POINTS / 2^i, ... and those below bound are counted by a shift.
    """
    below = 0
    start = 0
    for digit in reversed(range(num_points.bit_length())):
        if num_points >> digit & 1:
            gap_bits = POINT_BITS - digit
            if bound > start:
                below += min((bound - start - 1 >> gap_bits) + 1, 1 << digit)
            start += 1 << (gap_bits - 1)
    return below


@dataclass(frozen=True, slots=True)
class Sample:
    """Where one sample's tokens are."""

    source: int
    """Number of the source."""
    epoch: int
    """How many times its pool was read before."""
    block: int
    """Number of the block in the source."""


class SampleOrder:
    """Sample number -> block, for as many epochs as asked for.

    With weights each source is a pool of its own, repeated as often as its weight wants. Without, all sources are one
    pool, so that every block comes exactly once per epoch.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], weights: Sequence[float] | None, seed: int):
        """
        Args:
            names: of the sources; the order depends on them, so that equally large sources are shuffled differently.
            sizes: blocks of each source; with weights at least one.
            weights: share of the samples, relative; None: in proportion to the sizes.
            seed: of the run.
        """
        assert all(sizes) if weights else sum(sizes), f"sources {list(names)} of {list(sizes)} blocks"
        self._names = list(names)
        self._sizes = list(sizes)
        self._seed = seed
        self._mixture = None if weights is None else Mixture(weights)
        self._starts = [0, *accumulate(sizes)]

    def sample(self, number: int) -> Sample:
        """Where sample `number` (from 0, over the whole run and all ranks) is."""
        if self._mixture is None:
            epoch, index = divmod(number, self._starts[-1])
            pooled = permute(index, self._starts[-1], self._key("", epoch))
            source = bisect_right(self._starts, pooled) - 1
            return Sample(source, epoch, pooled - self._starts[source])
        source, index = self._mixture.locate(number)
        epoch, index = divmod(index, self._sizes[source])
        return Sample(source, epoch, permute(index, self._sizes[source], self._key(self._names[source], epoch)))

    def epochs(self, num_samples: int) -> dict[str, float]:
        """How many times the first samples go through each source."""
        if self._mixture is None:
            return dict.fromkeys(self._names, num_samples / self._starts[-1])
        counts = self._mixture.counts(num_samples)
        sizes = zip(self._names, counts, self._sizes, strict=True)
        return {name: count / size for name, count, size in sizes}

    def _key(self, name: str, epoch: int) -> int:
        digest = hashlib.blake2b(f"order\0{self._seed}\0{name}\0{epoch}".encode(), digest_size=8)
        return int.from_bytes(digest.digest(), "little")
