"""A checkpoint is complete or not there, in plain safetensors files: weights in one per rank, optimizer state in another."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dsllm.checkpoint.find import list_checkpoints
from dsllm.checkpoint.read_manifest import read_manifest
from dsllm.checkpoint.write import start_checkpoint, write_slices
from dsllm.config.migrate import CONFIG_VERSION
from dsllm.errors import CheckpointError
from dsllm.slices import WEIGHTS, Box, ParameterSlice, Region, whole
from tests.helpers.checkpoints import save_slices

WEIGHT = torch.arange(35, dtype=torch.float32)
WHOLE = whole((5, 7))


def piece(start: int, stop: int, box: Box = WHOLE, **more) -> ParameterSlice:
    """A region of the parameter `w` [5, 7] with a moment."""
    region = Region(box, start, stop)
    numbers = region.of(WEIGHT.view(5, 7))
    fields = {"tensors": {WEIGHTS: numbers, "exp_avg": 2 * numbers}, "scalars": {"step": 4.0}} | more
    return ParameterSlice(name="w", shape=(5, 7), region=region, **fields)


def tensors_in(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping


def test_weights_and_optimizer_state_are_in_files_of_their_own(tmp_path: Path):
    folder = save_slices(tmp_path, [[piece(0, 3)], [piece(3, 35)]])
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        *("optimizer-00000.safetensors", "optimizer-00001.safetensors"),
        *("weights-00000.safetensors", "weights-00001.safetensors"),
    ]
    weights, optimizer = (tensors_in(folder / f"{kind}-00001.safetensors") for kind in ("weights", "optimizer"))
    assert weights.keys() == {"w@3/weights"} and torch.equal(weights["w@3/weights"], WEIGHT[3:])
    assert optimizer.keys() == {"w@3/exp_avg"} and torch.equal(optimizer["w@3/exp_avg"], 2 * WEIGHT[3:])


def test_pieces_of_boxes_have_names_of_their_own(tmp_path: Path):
    left, right = Box((0, 0), (5, 4)), Box((0, 4), (5, 7))
    folder = save_slices(tmp_path, [[piece(0, 20, left), piece(0, 9, right), piece(9, 15, right)]])
    found = tensors_in(folder / "weights-00000.safetensors")
    assert found.keys() == {"w@0,0:0/weights", "w@0,4:0/weights", "w@0,4:9/weights"}
    assert torch.equal(found["w@0,4:9/weights"], WEIGHT.view(5, 7)[3:, 4:].reshape(-1))


def test_there_is_no_optimizer_file_without_state(tmp_path: Path):
    frozen = piece(0, 35, tensors={WEIGHTS: WEIGHT}, scalars={}, trainable=False)
    folder = save_slices(tmp_path, [[frozen], []])
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "weights-00000.safetensors"]
    assert [(part.optimizer, len(part.slices)) for part in read_manifest(folder).parts] == [(None, 1), (None, 0)]


@pytest.mark.parametrize("layout", ["strided", "bf16"])
def test_tensors_are_written_by_value(tmp_path: Path, layout: str):
    numbers = torch.stack([WEIGHT, -WEIGHT], 1)[:, 0] if layout == "strided" else WEIGHT.bfloat16()
    folder = save_slices(tmp_path, [[piece(0, 35, tensors={WEIGHTS: numbers})]])
    assert torch.equal(tensors_in(folder / "weights-00000.safetensors")["w@0/weights"], WEIGHT)


@pytest.mark.parametrize(
    ("ranks", "problem"),
    [
        ([[piece(0, 3)], [piece(4, 35)]], "w: 34 of its 35 elements are there"),
        ([[piece(0, 4)], [piece(3, 35)]], "w: elements of .* are in .* too"),
        ([[piece(0, 5, Box((0, 0), (5, 1)))], [piece(1, 35)]], "w: elements of .* are in .* too"),
        ([[piece(0, 3)], [piece(3, 35, scalars={"step": 5.0})]], "w: rank 1 would save it as .*'step': 5.0"),
    ],
)
def test_what_is_not_whole_is_not_published(tmp_path: Path, ranks: list[list[ParameterSlice]], problem: str):
    with pytest.raises(CheckpointError, match=problem):
        save_slices(tmp_path, ranks)
    assert list_checkpoints(tmp_path) == []


def test_numbers_that_json_cannot_hold_are_refused_by_name(tmp_path: Path):
    bad = {"progress": {"loss": float("nan")}, "deepspeed": {"a": [1, float("inf")]}}
    names = r"progress\.loss, deepspeed\.a\.1, parameters\.w\.scalars\.step"
    with pytest.raises(CheckpointError, match=f"{names} must be finite numbers"):
        save_slices(tmp_path, [[piece(0, 35, scalars={"step": float("-inf")})]], fields=bad)
    assert list_checkpoints(tmp_path) == []


def test_a_save_that_was_killed_is_no_checkpoint_and_is_cleaned_up(tmp_path: Path):
    aside = start_checkpoint(tmp_path, 8)
    write_slices(aside, 0, [piece(0, 35)])
    assert list_checkpoints(tmp_path) == []
    save_slices(tmp_path, [[piece(0, 35)]], 12)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000012"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path):
    first = save_slices(tmp_path, [[piece(0, 35)]])
    (first / "weights-00000.safetensors").write_bytes(b"damaged")
    (first / "more").write_text("")
    assert save_slices(tmp_path, [[piece(0, 35)]]) == first
    assert [p.name for p in tmp_path.iterdir()] == [first.name] and not (first / "more").exists()


def test_a_disk_that_refuses_is_named(tmp_path: Path):
    with pytest.raises(
        CheckpointError, match=r"weights-00000\.safetensors: cannot be written: No such file.*GiB are free"
    ):
        aside = tmp_path / "absent"
        aside.mkdir()
        (aside / "weights-00000.safetensors").symlink_to(aside / "nowhere" / "file")
        write_slices(aside, 0, [piece(0, 35)])


def test_the_config_is_saved_with_its_version(tmp_path: Path):
    raw = json.loads((save_slices(tmp_path, [[piece(0, 35)]]) / "manifest.json").read_text())
    assert raw["format_version"] == 3
    assert raw["config_version"] == list(CONFIG_VERSION)
    assert raw["config_changed"] == ["run.name", "run.directory", "model.vocab_size"]
    assert dataclasses.asdict(read_manifest(tmp_path / "step-00000004"))["config"] == raw["config"]
