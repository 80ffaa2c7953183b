"""A checkpoint is whole or not there, any range of it can be read, and damage is found."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dsllm.checkpoint.find import find_checkpoint, list_checkpoints, newest_sound, retire
from dsllm.checkpoint.manifest import CheckpointManifest
from dsllm.checkpoint.read import CheckpointReader, damage_in
from dsllm.checkpoint.write import (
    checkpoint_name,
    merge_parameters,
    publish_checkpoint,
    start_checkpoint,
    write_slices,
)
from dsllm.errors import CheckpointError
from dsllm.slices import WEIGHTS, ParameterSlice, Region, whole

WEIGHT = torch.arange(35, dtype=torch.float32)


def region(start: int, stop: int) -> Region:
    """These elements of the parameter `w`."""
    return Region(whole((5, 7)), start, stop)


def pieces(cuts: list[int]) -> list[ParameterSlice]:
    """The parameter `w` [5, 7] cut at these elements, with a moment beside it."""
    bounds = [0, *cuts, 35]
    return [
        ParameterSlice(
            name="w",
            shape=(5, 7),
            region=region(a, b),
            tensors={WEIGHTS: WEIGHT[a:b], "exp_avg": WEIGHT[a:b] * 2},
            scalars={"step": 4.0},
        )
        for a, b in pairwise(bounds)
    ]


def save(directory: Path, step: int = 4, cuts: tuple[int, ...] = (3, 20)) -> Path:
    """A checkpoint in which each piece was written by a rank of its own."""
    aside = start_checkpoint(directory, step)
    written = [write_slices(aside, rank, [piece]) for rank, piece in enumerate(pieces(list(cuts)))]
    manifest = CheckpointManifest(
        progress={"step": step},
        engine={},
        config={},
        deepspeed={},
        versions={},
        parameters=merge_parameters([w[1] for w in written]),
        files=[w[0] for w in written],
    )
    final = directory / checkpoint_name(step)
    publish_checkpoint(aside, final, manifest)
    return final


def test_any_range_can_be_read(tmp_path):
    reader = CheckpointReader(save(tmp_path))
    for start in range(35):
        for stop in range(start + 1, 36):
            assert torch.equal(reader.read("w", WEIGHTS, region(start, stop)), WEIGHT[start:stop])
    assert torch.equal(reader.read_whole("w"), WEIGHT.view(5, 7))
    assert torch.equal(reader.read("w", "exp_avg", region(2, 30)), 2 * WEIGHT[2:30])
    assert reader.keys("w") == (WEIGHTS, "exp_avg") and reader.scalars("w") == {"step": 4.0} and reader.step == 4


def test_the_files_are_plain_safetensors(tmp_path):
    with safe_open(save(tmp_path) / "slices-00001.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"w@3/weights", "w@3/exp_avg"}
        assert torch.equal(file.get_tensor("w@3/weights"), WEIGHT[3:20])


def test_unknown_parameters_and_gaps_are_named(tmp_path):
    folder = save(tmp_path)
    with pytest.raises(CheckpointError, match="has no parameter v"):
        CheckpointReader(folder).read("v", WEIGHTS, region(0, 1))
    raw = json.loads((folder / "manifest.json").read_text())
    raw["files"] = raw["files"][:2]
    (folder / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"holds 20 of the 35 elements \[0, 35\) of w"):
        CheckpointReader(folder).read_whole("w")


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "manifest", "version"])
def test_damage_is_found(tmp_path, harm):
    folder = save(tmp_path)
    assert damage_in(folder) is None
    file, manifest = folder / "slices-00002.safetensors", folder / "manifest.json"
    if harm == "flip":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "remove":
        file.unlink()
    elif harm == "manifest":
        manifest.write_text(manifest.read_text()[:-5])
    else:
        manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    problem = damage_in(folder)
    assert problem and str(manifest if harm in ("manifest", "version") else file) in problem
    # the ranks share the files: exactly the one that reads the damaged file finds it
    found = [damage_in(folder, rank, 3) for rank in range(3)]
    assert sum(answer is not None for answer in found) == (3 if harm in ("manifest", "version") else 1)


def test_the_newest_sound_one_is_taken_and_the_damage_told(tmp_path):
    old, new = save(tmp_path, 4), save(tmp_path, 12)
    (new / "slices-00000.safetensors").unlink()
    told: list[str] = []
    assert newest_sound(tmp_path, told.append) == old
    assert len(told) == 1 and str(new) in told[0]
    (old / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints verifies"):
        newest_sound(tmp_path, told.append)
    assert newest_sound(tmp_path / "absent", told.append) is None


def test_a_save_that_was_killed_is_no_checkpoint_and_is_cleaned_up(tmp_path):
    aside = start_checkpoint(tmp_path, 8)
    write_slices(aside, 0, pieces([]))
    assert list_checkpoints(tmp_path) == []
    save(tmp_path, 12)
    assert not aside.exists()


def test_find_takes_a_run_or_a_checkpoint(tmp_path):
    folder = save(tmp_path / "checkpoints")
    assert find_checkpoint(tmp_path, print) == find_checkpoint(folder, print) == folder
    with pytest.raises(CheckpointError, match="is neither a run directory with checkpoints nor a checkpoint"):
        find_checkpoint(tmp_path / "checkpoints", print)


def test_retiring_keeps_the_newest_and_the_milestones(tmp_path):
    for step in (5, 10, 15, 20, 25):
        save(tmp_path, step)
    removed = retire(tmp_path, keep_last=2, keep_every_steps=10)
    assert {p.name for p in removed} == {"step-00000005", "step-00000015"}
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000025", "step-00000020", "step-00000010"]
