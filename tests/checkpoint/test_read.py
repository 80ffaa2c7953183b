"""Any region of any parameter can be read, whichever boxes and ranges it was stored in."""

import dataclasses
import itertools
import math
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dsllm.checkpoint.read import CheckpointReader
from dsllm.errors import CheckpointError
from dsllm.slices import WEIGHTS, Box, ParameterSlice, Region, whole
from tests.helpers.checkpoints import RUN, edit_manifest, save_slices

Shape = tuple[int, ...]


def values(shape: Shape, factor: float = 1.0) -> torch.Tensor:
    """A parameter whose elements are all different."""
    return factor * torch.arange(math.prod(shape), dtype=torch.float32).view(shape)


def piece(shape: Shape, region: Region, name: str = "w", **more) -> ParameterSlice:
    """A slice of a parameter and its first moment, which is twice the weights."""
    tensors = {WEIGHTS: region.of(values(shape)), "exp_avg": region.of(values(shape, 2.0))}
    fields = {"tensors": tensors, "scalars": {"step": 4.0}} | more
    return ParameterSlice(name=name, shape=shape, region=region, **fields)


def flat_cuts(box: Box, num_parts: int) -> list[Region]:
    """A box cut into flat ranges, as ZeRO does."""
    bounds = [box.num_elements * i // num_parts for i in range(num_parts + 1)]
    return [Region(box, a, b) for a, b in pairwise(bounds) if a < b]


def tensor_cuts(shape: Shape, axis: int, num_parts: int) -> list[Box]:
    """A parameter cut along an axis, as tensor parallelism does; the parts need not be equal."""
    bounds = [shape[axis] * i // num_parts for i in range(num_parts + 1)]

    def at(values: Shape, value: int) -> Shape:
        return (*values[:axis], value, *values[axis + 1 :])

    return [Box(at((0,) * len(shape), a), at(shape, b)) for a, b in pairwise(bounds)]


def layouts(shape: Shape) -> dict[str, list[Region]]:
    """Ways to cut a parameter into pieces, each covering it once."""
    found = {"one": [whole(shape)]}
    found |= {f"axis {axis}": tensor_cuts(shape, axis, min(3, shape[axis])) for axis in range(len(shape))}
    return {
        f"{name} x {num_parts}": [region for box in boxes for region in flat_cuts(box, num_parts)]
        for name, boxes in found.items()
        for num_parts in (1, 2, 3)
    }


def save_layout(directory: Path, shape: Shape, regions: list[Region]) -> CheckpointReader:
    """A checkpoint in which each region was written by a rank of its own."""
    return CheckpointReader(save_slices(directory, [[piece(shape, region)] for region in regions]))


@pytest.mark.parametrize("shape", [(), (5,), (5, 7), (3, 4, 2)])
def test_any_layout_reads_any_region_of_any_other(tmp_path: Path, shape: Shape):
    source, every = random.Random(1), layouts(shape)
    for number, regions in enumerate(every.values()):
        reader = save_layout(tmp_path / str(number), shape, regions)
        regions = list(itertools.chain(*every.values()))
        regions += [
            Region(r.box, a, b) for r in regions for a, b in [sorted(source.choices(range(r.stop + 1), k=2))] if a < b
        ]
        for region in regions:
            assert torch.equal(reader.read("w", WEIGHTS, region), region.of(values(shape)))
            assert torch.equal(reader.read("w", "exp_avg", region), region.of(values(shape, 2.0)))
        assert torch.equal(reader.read_whole("w"), values(shape))


def test_every_range_of_a_parameter(tmp_path: Path):
    reader = save_layout(tmp_path, (5, 7), flat_cuts(whole((5, 7)), 3))
    for start in range(35):
        for stop in range(start + 1, 36):
            region = Region(whole((5, 7)), start, stop)
            assert torch.equal(reader.read("w", WEIGHTS, region), region.of(values((5, 7))))
    assert reader.keys("w") == (WEIGHTS, "exp_avg") and reader.scalars("w") == {"step": 4.0} and reader.step == 4


def test_the_layout_is_not_in_what_is_read(tmp_path: Path):
    """Names, shapes, keys, scalars and values are the same, however many ranks cut the parameters along whichever axis."""
    shape = (6, 4)
    readers = [save_layout(tmp_path / str(i), shape, cut) for i, cut in enumerate(layouts(shape).values())]
    assert len({str(reader.manifest.parameters) for reader in readers}) == 1
    assert all(torch.equal(reader.read_whole("w"), values(shape)) for reader in readers)


def test_parameters_may_differ_in_what_is_kept_of_them(tmp_path: Path):
    """Muon keeps one tensor, AdamW two, a frozen parameter none; experts have numbers."""
    shape, all_of_it = (2, 3), Region(whole((2, 3)), 0, 6)
    weights = {WEIGHTS: values(shape).reshape(-1)}
    slices = [
        piece(shape, all_of_it, "adamw", tensors=weights | {"exp_avg": torch.ones(6), "exp_avg_sq": torch.ones(6)}),
        piece(shape, all_of_it, "muon", tensors=weights | {"momentum_buffer": torch.full((6,), 3.0)}, scalars={}),
        piece(shape, all_of_it, "frozen", tensors=weights, scalars={}, trainable=False),
        piece(shape, all_of_it, "expert", expert=17),
    ]
    reader = CheckpointReader(save_slices(tmp_path, [slices]))
    assert {name: reader.keys(name) for name in reader.names()} == {
        "adamw": (WEIGHTS, "exp_avg", "exp_avg_sq"),
        "muon": (WEIGHTS, "momentum_buffer"),
        "frozen": (WEIGHTS,),
        "expert": (WEIGHTS, "exp_avg"),
    }
    assert torch.equal(reader.read("muon", "momentum_buffer", Region(whole(shape), 2, 5)), torch.full((3,), 3.0))
    records = reader.manifest.parameters
    assert [records[name].trainable for name in reader.names()] == [True, True, False, True]
    assert [records[name].expert for name in reader.names()] == [None, None, None, 17]
    with pytest.raises(CheckpointError, match="has no exp_avg of frozen, only weights"):
        reader.read("frozen", "exp_avg", all_of_it)


def test_unknown_parameters_are_named(tmp_path: Path):
    reader = save_layout(tmp_path, (5, 7), flat_cuts(whole((5, 7)), 2))
    with pytest.raises(CheckpointError, match="has no parameter v"):
        reader.read("v", WEIGHTS, Region(whole((5, 7)), 0, 1))


def edit_parts(folder: Path, edit) -> CheckpointReader:
    """The checkpoint after a change to its manifest's list of parts."""
    edit_manifest(folder, lambda raw: edit(raw["parts"]))
    return CheckpointReader(folder)


def test_missing_elements_are_an_error(tmp_path: Path):
    folder = save_layout(tmp_path, (5, 7), flat_cuts(whole((5, 7)), 3)).folder
    reader = edit_parts(folder, lambda parts: parts.pop())
    with pytest.raises(CheckpointError, match=r"contains 23 of the 35 elements \[0, 35\) of w \(weights\)"):
        reader.read_whole("w")
    assert torch.equal(reader.read("w", WEIGHTS, Region(whole((5, 7)), 3, 20)), values((5, 7)).view(-1)[3:20])


def test_elements_stored_twice_are_an_error(tmp_path: Path):
    """Also where as many are missing, so that the count is right."""
    folder = save_layout(tmp_path, (5, 7), flat_cuts(whole((5, 7)), 3)).folder

    def shift(parts):
        parts[1]["slices"][0] |= {"start": 10, "stop": 22}

    with pytest.raises(CheckpointError, match="stores elements of w twice"):
        edit_parts(folder, shift).read_whole("w")


def test_a_missing_optimizer_file_leaves_the_weights_readable(tmp_path: Path):
    folder = save_layout(tmp_path, (5, 7), flat_cuts(whole((5, 7)), 2)).folder
    for file in folder.glob("optimizer-*"):
        file.unlink()
    reader = CheckpointReader(folder)
    assert torch.equal(reader.read_whole("w"), values((5, 7)))
    with pytest.raises(CheckpointError, match=r"optimizer-00000\.safetensors: cannot be read"):
        reader.read("w", "exp_avg", Region(whole((5, 7)), 0, 1))


def test_run_and_model_come_back(tmp_path: Path):
    reader = save_layout(tmp_path, (2,), [Region(whole((2,)), 0, 2)])
    assert reader.run() == dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, directory="data/tiny"))
    assert reader.model_config == RUN.model
