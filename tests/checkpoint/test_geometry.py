"""The elements that two regions share are those that plain indexing finds, for every region of small arrays."""

import itertools
import math
import random

import pytest
import torch

from dsllm.checkpoint.geometry import covered_twice, overlaps, rectangles
from dsllm.slices import Box, Region, whole

Shape = tuple[int, ...]
SHAPES: list[Shape] = [(), (1,), (7,), (1, 1), (3, 4), (4, 1), (1, 5), (2, 3, 2), (3, 1, 2)]


def numbered(shape: Shape) -> torch.Tensor:
    """An array in which every element is its own flat number."""
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape)


def boxes(shape: Shape) -> list[Box]:
    """Every box in an array that has an element."""
    cuts = [[(a, b) for a in range(size) for b in range(a + 1, size + 1)] for size in shape]
    return [Box(tuple(a for a, _ in cut), tuple(b for _, b in cut)) for cut in itertools.product(*cuts)]


def ranges(size: int) -> list[tuple[int, int]]:
    return [(a, b) for a in range(size) for b in range(a + 1, size + 1)]


def regions(shape: Shape) -> list[Region]:
    """Every region of an array that has an element."""
    return [Region(box, a, b) for box in boxes(shape) for a, b in ranges(box.num_elements)]


def random_region(shape: Shape, source: random.Random) -> Region:
    box = Box(*zip(*(sorted(source.sample(range(size + 1), 2)) for size in shape), strict=True))
    start, stop = sorted(source.sample(range(box.num_elements + 1), 2))
    return Region(box, start, stop)


def check_overlaps(shape: Shape, wanted: Region, stored: Region) -> None:
    """Copy what is shared, as a reader does, and compare with plain indexing."""
    array = numbered(shape)
    values, expected = stored.of(array).clone(), wanted.of(array)
    out, times = torch.full((len(wanted),), -1.0), torch.zeros(len(wanted))
    for overlap in overlaps(wanted, stored):
        part = values[overlap.stored_start : overlap.stored_stop]
        place = (overlap.shape, overlap.wanted_strides, overlap.wanted_start)
        out.as_strided(*place).copy_(part.as_strided(overlap.shape, overlap.stored_strides))
        times.as_strided(*place).add_(1)
        assert overlap.num_elements == math.prod(overlap.shape) > 0
    shared = torch.isin(expected, values)
    assert torch.equal(times, shared.float()), (wanted, stored)
    assert torch.equal(out[shared], expected[shared]), (wanted, stored)


@pytest.mark.parametrize("shape", SHAPES)
def test_rectangles_are_the_range_in_order(shape: Shape):
    array = numbered(shape)
    for start, stop in ranges(math.prod(shape)):
        found = list(rectangles(shape, start, stop))
        parts = [Region(box, 0, box.num_elements).of(array) for _, box in found]
        assert torch.equal(torch.cat(parts), array.reshape(-1)[start:stop])
        assert [offset for offset, _ in found] == [int(part[0]) for part in parts]
        assert len(found) <= max(1, 2 * len(shape) - 1)
    assert list(rectangles(shape, 0, 0)) == []


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3), (2, 2, 1)])
def test_overlaps_of_every_two_regions(shape: Shape):
    every = regions(shape)
    for wanted, stored in itertools.product(every, every):
        check_overlaps(shape, wanted, stored)


@pytest.mark.parametrize("shape", [(50,), (9, 11), (5, 6, 7), (3, 4, 2, 5)])
def test_overlaps_of_random_regions(shape: Shape):
    source = random.Random(len(shape))
    for _ in range(400):
        check_overlaps(shape, random_region(shape, source), random_region(shape, source))


def test_the_same_box_is_one_contiguous_piece():
    box = Box((2, 0), (5, 4))
    (overlap,) = overlaps(Region(box, 3, 11), Region(box, 5, 12))
    assert (overlap.shape, overlap.wanted_start, overlap.stored_start, overlap.stored_stop) == ((6,), 2, 0, 6)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (3, 4, 5)])
def test_covered_twice_finds_what_counting_finds(shape: Shape):
    source, outcomes = random.Random(7), set()
    for _ in range(300):
        found = [random_region(shape, source) for _ in range(source.randrange(1, 4))]
        times = torch.zeros(shape)
        for region in found:
            times.view(-1)[region.of(numbered(shape)).long()] += 1
        answer = covered_twice(found)
        assert (answer is not None) == bool((times > 1).any())
        assert answer is None or overlaps(*answer)
        outcomes.add(answer is None)
    assert outcomes == {True, False}
    assert covered_twice([Region(whole(shape), 0, 2), Region(whole(shape), 2, 5)]) is None
