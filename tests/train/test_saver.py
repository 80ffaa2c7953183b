"""A checkpoint saved under one layout loads under every other: state bit for bit, losses up to rounding."""

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from dsllm.train.progress import Progress
from dsllm.train.saving import RunRecord, restore, save_checkpoint

from dsllm.checkpoint.find import list_checkpoints
from dsllm.checkpoint.read import CheckpointReader, damage_in
from dsllm.config.load import run_to_dict
from dsllm.config.run import RunConfig
from dsllm.config.train import CheckpointConfig
from dsllm.engine.processes.process_group import World
from dsllm.engine.state import owned_slices
from dsllm.slices import WEIGHTS, Region, whole
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_engine, tiny_run, tiny_step

Layouts = dict[str, tuple[int, dict[str, Any]]]
CPU = {"device": "cpu"}
LAYOUTS: Layouts = {
    "0": (0, {}),
    "1": (1, {}),
    "2": (2, {}),
    "3": (3, {}),
    "2-offload": (2, {"offload_optimizer": CPU}),
    "3-offload": (3, {"offload_optimizer": CPU, "offload_param": CPU}),
    "3-hpz": (3, {"zero_hpz_partition_size": "auto"}),
}
"""ZeRO stage, and what the DeepSpeed JSON says beside it; NVMe is in tests/engine/test_nvme.py."""
WORLDS = (1, 2)
STEPS_BEFORE, STEPS_AFTER = 3, 3


def steps(engine, config: RunConfig, world: World, first: int, count: int) -> list[float]:
    return [tiny_step(engine, config, s).loss for s in range(first, first + count)]


def save_under_each_layout(
    world: World, config: RunConfig, directory: Path, layouts: Layouts
) -> dict[str, list[float]]:
    """Train, save and go on; the losses after the save."""
    losses = {}
    for name, (stage, zero) in layouts.items():
        engine = tiny_engine(world, config, stage, **zero)
        steps(engine, config, world, 0, STEPS_BEFORE)
        record = RunRecord(config=run_to_dict(config), deepspeed={}, versions={})
        save_checkpoint(
            engine, Progress(step=STEPS_BEFORE), record, directory / f"{world.size}-{name}", CheckpointConfig()
        )
        losses[name] = steps(engine, config, world, STEPS_BEFORE, STEPS_AFTER)
    return losses


def load_under_each_layout(world: World, config: RunConfig, folder: Path, layouts: Layouts) -> dict[str, list[float]]:
    """Load, compare the state with the file bit for bit, and go on; the losses."""
    losses = {}
    reader = CheckpointReader(folder)
    for name, (stage, zero) in layouts.items():
        engine = tiny_engine(world, config, stage, **zero)
        assert restore(engine, reader) == Progress(step=STEPS_BEFORE)
        for piece in owned_slices(engine):
            assert piece.scalars == {"step": STEPS_BEFORE}
            for key, tensor in piece.tensors.items():
                assert torch.equal(tensor, reader.read(piece.name, key, piece.region)), (
                    name,
                    piece.name,
                    key,
                )
        losses[name] = steps(engine, config, world, STEPS_BEFORE, STEPS_AFTER)
    return losses


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[int, str], tuple[Path, list[float]]]:
    """A checkpoint of the same run under a world size and layout, and the losses that followed there."""

    @cache
    def saved_under(world_size: int, layout: str) -> tuple[Path, list[float]]:
        directory, only = tmp_path_factory.mktemp("saved"), {layout: LAYOUTS[layout]}
        losses = run_ranks(world_size, save_under_each_layout, tiny_run(), directory, only)[0]
        (folder,) = list_checkpoints(directory / f"{world_size}-{layout}" / "checkpoints")
        return folder, losses[layout]

    return saved_under


QUICK = {("3-offload", 2, 1)}


@pytest.mark.parametrize(
    ("from_layout", "from_world", "world_size"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(LAYOUTS, WORLDS, WORLDS)
    ],
)
def test_any_layout_resumes_from_any_other(saved, from_layout, from_world, world_size):
    folder, losses = saved(from_world, from_layout)
    went_on = run_ranks(world_size, load_under_each_layout, tiny_run(), folder, LAYOUTS)[0]
    for name, values in went_on.items():
        if (world_size, name) == (from_world, from_layout):
            assert values == losses  # the same layout: to the last bit
        # another layout sums in another order: the bound of tests/engine/test_step.py
        assert values == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name == "3-offload" else pytest.mark.slow) for name in LAYOUTS]
)
def test_slices_cover_every_element_once(saved, layout):
    reader = CheckpointReader(saved(2, layout)[0])
    assert damage_in(reader.folder) is None
    assert len(reader.manifest.files) == 2
    for name in reader.names():
        pieces = sorted((start, stop) for f in reader.manifest.files for n, start, stop in f.slices if n == name)
        assert pieces[0][0] == 0 and pieces[-1][1] == reader.read_whole(name).numel()
        assert all(left[1] == right[0] for left, right in itertools.pairwise(pieces))


@pytest.mark.slow
def test_every_layout_saves_the_same_state(saved):
    """Layouts differ in where the state lies, not in what it is: equal up to the rounding of three steps."""
    readers = [CheckpointReader(saved(w, name)[0]) for w in WORLDS for name in LAYOUTS]
    for name in readers[0].names():
        first = readers[0].read_whole(name)
        for other in readers[1:]:
            # Adam's steps have size lr = 1e-3 whatever the gradient's: where a gradient is all rounding, they may differ whole
            assert (other.read_whole(name) - first).abs().max() <= 2 * STEPS_BEFORE * 1e-3
            assert (
                torch.nn.functional.cosine_similarity(other.read_whole(name).flatten(), first.flatten(), dim=0)
                > 1 - 1e-6
            )


def test_moments_are_saved(saved):
    reader = CheckpointReader(saved(2, "3-offload")[0])
    name = "layers.0.mlp.up.weight"
    assert reader.keys(name) == (WEIGHTS, "exp_avg", "exp_avg_sq")
    region = Region(whole(reader.shape(name)), 0, reader.read_whole(name).numel())
    assert reader.read(name, "exp_avg", region).abs().max() > 0
    assert reader.read(name, "exp_avg_sq", region).min() >= 0
