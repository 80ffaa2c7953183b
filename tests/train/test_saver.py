"""A checkpoint saved under one layout loads under every other: state bit for bit, losses up to rounding."""

import itertools
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dsllm.checkpoint.find import checkpoint_name, list_checkpoints
from dsllm.checkpoint.read import CheckpointReader
from dsllm.checkpoint.verify import damage_in
from dsllm.config.run import RunConfig
from dsllm.data.position import Position
from dsllm.engine.processes.process_group import World
from dsllm.engine.state import load_state, owned_slices
from dsllm.run_directory import CHECKPOINTS
from dsllm.session.progress import Progress
from dsllm.session.record import RunRecord
from dsllm.session.resume import progress_of
from dsllm.slices import WEIGHTS, Region, whole
from dsllm.train.saver import Saver
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import GLOBAL_BATCH, tiny_engine, tiny_run, tiny_step

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
"""ZeRO stage, and what else the DeepSpeed JSON says; NVMe is in tests/engine/test_nvme.py."""
WORLDS = (1, 2)
STEPS_BEFORE, STEPS_AFTER = 3, 3
PROGRESS = Progress(step=STEPS_BEFORE, position=Position(STEPS_BEFORE * GLOBAL_BATCH))


def steps(engine, config: RunConfig, world: World, first: int, count: int) -> list[float]:
    return [tiny_step(engine, config, s).loss for s in range(first, first + count)]


def save(engine, config: RunConfig, directory: Path, **more: Any) -> list[str]:
    """Save as training does after the first steps; what was reported."""
    lines: list[str] = []
    saver = Saver(directory, RunRecord(config=config, deepspeed={}), lines.append, **more)
    saver.start(engine, PROGRESS)
    assert saver.poll() == directory / CHECKPOINTS / checkpoint_name(STEPS_BEFORE)
    assert saver.poll() is None and saver.finish() is None  # each checkpoint is reported once
    return lines


def save_under_each_layout(
    world: World, config: RunConfig, directory: Path, layouts: Layouts
) -> dict[str, list[float]]:
    """Train, save and continue; the losses after the save."""
    losses = {}
    for name, (stage, zero) in layouts.items():
        engine = tiny_engine(world, config, stage, **zero)
        steps(engine, config, world, 0, STEPS_BEFORE)
        save(engine, config, directory / f"{world.size}-{name}")
        losses[name] = steps(engine, config, world, STEPS_BEFORE, STEPS_AFTER)
    return losses


def load_under_each_layout(world: World, config: RunConfig, folder: Path, layouts: Layouts) -> dict[str, list[float]]:
    """Load, compare the state with the file bit for bit, and continue; the losses."""
    losses = {}
    reader = CheckpointReader(folder)
    for name, (stage, zero) in layouts.items():
        engine = tiny_engine(world, config, stage, **zero)
        load_state(engine, reader)
        assert progress_of(reader, config) == PROGRESS
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


@pytest.mark.slow
@pytest.mark.parametrize(("from_layout", "from_world", "world_size"), list(itertools.product(LAYOUTS, WORLDS, WORLDS)))
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
    assert len(reader.manifest.parts) == 2 and len(reader.manifest.files("all")) == 4
    slices = [piece for part in reader.manifest.parts for piece in part.slices]
    for name in reader.names():
        pieces = sorted((piece.start, piece.stop) for piece in slices if piece.name == name)
        assert pieces[0][0] == 0 and pieces[-1][1] == reader.read_whole(name).numel()
        assert all(left[1] == right[0] for left, right in itertools.pairwise(pieces))


@pytest.mark.slow
def test_every_layout_saves_the_same_state(saved):
    """Layouts differ in where the state is, not in what it is: equal up to the rounding of three steps."""
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


def save_over(world: World, config: RunConfig, directory: Path, damaged: list[Path]) -> list[str]:
    """Save where these checkpoints are known to be damaged; what was reported."""
    engine = tiny_engine(world, config, 1)
    steps(engine, config, world, 0, 1)
    return save(engine, config, directory, damaged=damaged)


def test_a_save_removes_what_was_damaged_and_survives_what_it_cannot_remove(saved, tmp_path: Path):
    folder, _ = saved(2, "3-offload")
    checkpoints = tmp_path / CHECKPOINTS
    for step in (1, 2, 9):
        shutil.copytree(folder, checkpoints / checkpoint_name(step))
        if step == 9:
            (checkpoints / checkpoint_name(step) / "manifest.json").write_text("{")
    damaged = [checkpoints / checkpoint_name(9), checkpoints / checkpoint_name(2)]
    in_the_way = checkpoints / f".{checkpoint_name(2)}.removing"
    in_the_way.write_text("a file")
    (lines,) = run_ranks(1, save_over, tiny_run(), tmp_path, damaged)
    assert len(lines) == 1 and "step-00000002: is not removed: it is a copy of step" in lines[0]
    names = [checkpoint_name(step) for step in (STEPS_BEFORE, 2, 1)]
    assert [p.name for p in list_checkpoints(checkpoints)] == names
    assert damage_in(checkpoints / names[0]) is None
