"""Computes which block of which source is sample number n. Pure functions: no order is built, stored or sent.

Within a source a keyed permutation shuffles the blocks, differently in every epoch. A low-discrepancy sequence chooses
between the sources, so that after any number of samples each source has had its share to within a few samples.
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
POINTS = 2**POINT_BITS  # the most samples that a run may have: 2.8e14


def permute(index: int, size: int, key: int) -> int:
    """One element of a keyed shuffle of range(size), in constant time and memory for any size up to 2^64.

    A generalised Feistel network over pairs (x, y) with x < a, y < b and a b just above size. A result beyond size is
    permuted again (cycle walking), which happens to about one element in sqrt(size). Black and Rogaway, "Ciphers with
    arbitrary finite domains", CT-RSA 2002, sections 4 and 5.

    Args:
        index: an element of range(size).
        size: number of elements, at least 1.
        key: 64 bits; each key gives its own permutation.
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
    """A 64-bit hash of a number under a key.

    splitmix64's finaliser (Steele, Lea and Flood 2014), applied to the key and then to the key mixed with the number.
    """
    mixed = (key * GOLDEN64) & MASK64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    mixed = (mixed ^ (mixed >> 27) ^ value) * GOLDEN64 & MASK64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK64
    return mixed ^ (mixed >> 31)


class Mixture:
    """Chooses a source for each sample, deterministically and in proportion to weights.

    Each source owns a part of [0, 1), as large as its share. Sample n takes the source that owns the van der Corput point
    u_n (the bits of n, mirrored behind the binary point). After n samples a source of share w has had n w of them, to
    within log2(n) / 3 + 1 (Bejian and Faure 1977).
    """

    def __init__(self, weights: Sequence[float]):
        """
        Args:
            weights: relative to each other, none negative; a source of weight 0 is never chosen.
        """
        assert weights and min(weights) >= 0 and sum(weights) > 0, f"weights {weights}"
        total = sum(weights)
        self._bounds = [0, *(round(partial / total * POINTS) for partial in accumulate(weights))]
        self._bounds[-1] = POINTS

    def locate(self, sample: int) -> tuple[int, int]:
        """The source of a sample, and how many earlier samples have the same source; O(log sample)."""
        assert 0 <= sample < POINTS, f"sample {sample} of {POINTS}"
        source = bisect_right(self._bounds, _mirror(sample)) - 1
        return source, self.count(source, sample)

    def count(self, source: int, num_samples: int) -> int:
        """How many of the first `num_samples` samples a source has; O(log num_samples)."""
        return _points_below(self._bounds[source + 1], num_samples) - _points_below(self._bounds[source], num_samples)


def _mirror(value: int) -> int:
    """The POINT_BITS bits of a number in reverse."""
    return int(f"{value:0{POINT_BITS}b}"[::-1], 2)


def _points_below(bound: int, num_points: int) -> int:
    """How many of the first van der Corput points are below bound (both in units of 1 / POINTS).

    [0, num_points) is cut into one run of 2^i numbers for each binary digit i that is 1. The numbers of a run share their
    higher digits, so their points are equally spaced: start, start + POINTS / 2^i, ... A shift counts those below bound.
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
    """The block that a sample consists of."""

    source: int
    """Number of the source."""
    epoch: int
    """How many times the source (without weights: all sources together) was read completely before."""
    block: int
    """Number of the block in the source."""


class SampleOrder:
    """Finds the block of a sample, for any number of epochs.

    With weights each source is shuffled by itself and repeated as often as its weight demands. Without weights all
    sources are shuffled together, and every block comes exactly once per epoch.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], weights: Sequence[float] | None, seed: int):
        """
        Args:
            names: names of the sources; the order depends on them, so that sources of equal size are shuffled differently.
            sizes: number of blocks of each source; with weights at least one.
            weights: each source's share of the samples, relative to the others. None: in proportion to the sizes.
            seed: the run's seed.
        """
        assert all(sizes) if weights else sum(sizes), f"sources {list(names)} of {list(sizes)} blocks"
        self._names = list(names)
        self._sizes = list(sizes)
        self._seed = seed
        self._mixture = None if weights is None else Mixture(weights)
        self._starts = [0, *accumulate(sizes)]

    def sample(self, number: int) -> Sample:
        """The block of sample `number`, counted from 0 over the whole run and all ranks."""
        if self._mixture is None:
            epoch, index = divmod(number, self._starts[-1])
            pooled = permute(index, self._starts[-1], self._key("", epoch))
            source = bisect_right(self._starts, pooled) - 1
            return Sample(source, epoch, pooled - self._starts[source])
        source, index = self._mixture.locate(number)
        epoch, index = divmod(index, self._sizes[source])
        return Sample(source, epoch, permute(index, self._sizes[source], self._key(self._names[source], epoch)))

    def _key(self, name: str, epoch: int) -> int:
        digest = hashlib.blake2b(f"order\0{self._seed}\0{name}\0{epoch}".encode(), digest_size=8)
        return int.from_bytes(digest.digest(), "little")
