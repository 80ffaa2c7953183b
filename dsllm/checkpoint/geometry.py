"""Which elements two regions of a parameter share, and where each of the two stores them. No tensors, no files."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, pairwise, product

from dsllm.slices import Box, Region


@dataclass(frozen=True, slots=True)
class Overlap:
    """A rectangle of elements that two regions share, as a strided view into the flat values of each."""

    shape: tuple[int, ...]
    wanted_start: int
    """Offset of the first shared element in the wanted region's values."""
    wanted_strides: tuple[int, ...]
    stored_start: int
    """Offset of the first shared element in the stored region's values."""
    stored_strides: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Shared elements."""
        return math.prod(self.shape)

    @property
    def stored_stop(self) -> int:
        """Offset after the last shared element in the stored region's values."""
        steps = zip(self.shape, self.stored_strides, strict=True)
        return self.stored_start + 1 + sum((size - 1) * stride for size, stride in steps)


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, Box]]:
    """Cut the flat range [start, stop) of a row-major array into rectangles, at most 2 x dimensions - 1 of them.

    Each rectangle is one contiguous part of the range; yields the flat offset of its first element and its box.
    """
    if start >= stop:
        return
    if not shape:
        yield 0, Box((), ())
        return
    row = math.prod(shape[1:])
    first_full, after_full = -(-start // row), stop // row
    if first_full > after_full:  # the range begins and ends inside the same row
        yield from _in_row(shape, stop // row, start, stop)
        return
    yield from _in_row(shape, first_full - 1, start, first_full * row)
    if first_full < after_full:
        others = shape[1:]
        yield first_full * row, Box((first_full, *(0 for _ in others)), (after_full, *others))
    yield from _in_row(shape, after_full, after_full * row, stop)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[tuple[int, Box]]:
    """The rectangles of a flat range that is a part of one row of the first dimension."""
    before = index * math.prod(shape[1:])
    for offset, box in rectangles(shape[1:], start - before, stop - before):
        yield before + offset, Box((index, *box.start), (index + 1, *box.stop))


def overlaps(wanted: Region, stored: Region) -> list[Overlap]:
    """All elements that two regions of the same parameter share, each in exactly one rectangle."""
    if wanted.box == stored.box:  # the usual case: both ranges count the same elements
        low, high = max(wanted.start, stored.start), min(wanted.stop, stored.stop)
        return [Overlap((high - low,), low - wanted.start, (1,), low - stored.start, (1,))] if low < high else []
    if intersection(wanted.box, stored.box) is None:
        return []
    found = []
    stored_parts = list(_global_rectangles(stored))
    for wanted_offset, wanted_box in _global_rectangles(wanted):
        for stored_offset, stored_box in stored_parts:
            common = intersection(wanted_box, stored_box)
            if common is None:
                continue
            wanted_strides, stored_strides = _strides(wanted_box.shape), _strides(stored_box.shape)
            found.append(
                Overlap(
                    common.shape,
                    wanted_offset + _distance(wanted_box.start, common.start, wanted_strides),
                    wanted_strides,
                    stored_offset + _distance(stored_box.start, common.start, stored_strides),
                    stored_strides,
                )
            )
    return found


def intersection(one: Box, other: Box) -> Box | None:
    """The box that two boxes share; None: they share no element."""
    start = tuple(max(a, b) for a, b in zip(one.start, other.start, strict=True))
    stop = tuple(min(a, b) for a, b in zip(one.stop, other.stop, strict=True))
    return Box(start, stop) if all(low < high for low, high in zip(start, stop, strict=True)) else None


def covered_twice(regions: Sequence[Region]) -> tuple[Region, Region] | None:
    """Two regions of a parameter that share an element; None: no element is in two of them.

    A parameter has few different boxes but one flat range per rank, so ranges are compared with their neighbours only.
    """
    by_box = {
        box: sorted(found, key=lambda region: region.start)
        for box, found in groupby(sorted(regions, key=_box_key), key=lambda region: region.box)
    }
    for found in by_box.values():
        for one, other in pairwise(found):
            if other.start < one.stop:
                return one, other
    for box, other_box in combinations(by_box, 2):
        if intersection(box, other_box) is None:
            continue
        for one, other in product(by_box[box], by_box[other_box]):
            if overlaps(one, other):
                return one, other
    return None


def _box_key(region: Region) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return region.box.start, region.box.stop


def _global_rectangles(region: Region) -> Iterator[tuple[int, Box]]:
    """The rectangles of a region in the parameter's own coordinates, with their offsets in the region's values."""
    origin = region.box.start
    for offset, box in rectangles(region.box.shape, region.start, region.stop):
        start = tuple(a + b for a, b in zip(box.start, origin, strict=True))
        stop = tuple(a + b for a, b in zip(box.stop, origin, strict=True))
        yield offset - region.start, Box(start, stop)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements from one index to the next along each dimension of a row-major array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _distance(origin: tuple[int, ...], point: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum((b - a) * stride for a, b, stride in zip(origin, point, strides, strict=True))
