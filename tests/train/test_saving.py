"""A checkpoint saved under one layout loads under every other: state bit for bit, losses up to rounding."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dsllm.checkpoint.find import list_checkpoints
from dsllm.checkpoint.read import CheckpointReader, damage_in
from dsllm.config.load import run_to_dict
from dsllm.config.run import RunConfig
from dsllm.config.train import CheckpointConfig
from dsllm.engine.process_group import World
from dsllm.engine.state import owned_slices
from dsllm.engine.step import take_step
from dsllm.slices import MASTER
from dsllm.train.progress import Progress
from dsllm.train.saving import RunRecord, restore, save_checkpoint
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import micro_batches, tiny_engine, tiny_run

STAGES, WORLDS = (0, 1, 2, 3), (1, 2)
STEPS_BEFORE, STEPS_AFTER = 3, 3


def steps(engine, config: RunConfig, world: World, first: int, count: int) -> list[float]:
    return [
        take_step(engine, micro_batches(config, s, world.rank, world.size), seed=s).loss
        for s in range(first, first + count)
    ]


def save_under_each_stage(
    world: World, config: RunConfig, directory: Path, stages: tuple[int, ...]
) -> dict[int, list[float]]:
    """Train, save and go on; the losses after the save."""
    losses = {}
    for stage in stages:
        engine = tiny_engine(world, config, stage)
        steps(engine, config, world, 0, STEPS_BEFORE)
        record = RunRecord(config=run_to_dict(config), deepspeed={}, versions={})
        save_checkpoint(
            engine, Progress(step=STEPS_BEFORE), record, directory / f"{world.size}-{stage}", CheckpointConfig()
        )
        losses[stage] = steps(engine, config, world, STEPS_BEFORE, STEPS_AFTER)
    return losses


def load_under_each_stage(
    world: World, config: RunConfig, folder: Path, stages: tuple[int, ...]
) -> dict[int, list[float]]:
    """Load, compare the state with the file bit for bit, and go on; the losses."""
    losses = {}
    reader = CheckpointReader(folder)
    for stage in stages:
        engine = tiny_engine(world, config, stage)
        assert restore(engine, reader) == Progress(step=STEPS_BEFORE)
        for piece in owned_slices(engine):
            assert piece.scalars == {"step": STEPS_BEFORE}
            for key, tensor in piece.tensors.items():
                assert torch.equal(tensor, reader.read(piece.name, key, piece.start, piece.stop)), (
                    stage,
                    piece.name,
                    key,
                )
        losses[stage] = steps(engine, config, world, STEPS_BEFORE, STEPS_AFTER)
    return losses


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[tuple[int, int], list[float]]]:
    """Checkpoints of the same run under each world size and stage, and the losses that followed there."""
    directory = tmp_path_factory.mktemp("saved")
    losses = {}
    for world_size in WORLDS:
        found = run_ranks(world_size, save_under_each_stage, tiny_run(), directory, STAGES)[0]
        losses |= {(world_size, stage): values for stage, values in found.items()}
    return directory, losses


def folder_of(directory: Path, world_size: int, stage: int) -> Path:
    (found,) = list_checkpoints(directory / f"{world_size}-{stage}" / "checkpoints")
    return found


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("from_world", WORLDS)
@pytest.mark.parametrize("from_stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_any_layout_resumes_from_any_other(saved, from_stage, from_world, world_size):
    directory, losses = saved
    folder = folder_of(directory, from_world, from_stage)
    went_on = run_ranks(world_size, load_under_each_stage, tiny_run(), folder, STAGES)[0]
    for stage, values in went_on.items():
        if (world_size, stage) == (from_world, from_stage):
            assert values == losses[from_world, from_stage]  # the same layout: to the last bit
        # another layout sums in another order: the bound of tests/engine/test_step.py
        assert values == pytest.approx(losses[from_world, from_stage], rel=1e-5)


def test_slices_cover_every_element_once(saved):
    directory, _ = saved
    for stage in STAGES:
        reader = CheckpointReader(folder_of(directory, 2, stage))
        assert damage_in(reader.folder) is None
        assert len(reader.manifest.files) == 2
        for name in reader.names():
            pieces = sorted((start, stop) for f in reader.manifest.files for n, start, stop in f.slices if n == name)
            assert pieces[0][0] == 0 and pieces[-1][1] == reader.read_whole(name).numel()
            assert all(left[1] == right[0] for left, right in pairwise(pieces))


def test_every_stage_saves_the_same_state(saved):
    """Stages differ in where the state lies, not in what it is: equal up to the rounding of three steps."""
    directory, _ = saved
    readers = [CheckpointReader(folder_of(directory, w, s)) for w in WORLDS for s in STAGES]
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
    directory, _ = saved
    reader = CheckpointReader(folder_of(directory, 2, 3))
    name = "layers.0.mlp.up.weight"
    assert reader.keys(name) == (MASTER, "exp_avg", "exp_avg_sq")
    size = reader.read_whole(name).numel()
    assert reader.read(name, "exp_avg", 0, size).abs().max() > 0
    assert reader.read(name, "exp_avg_sq", 0, size).min() >= 0
