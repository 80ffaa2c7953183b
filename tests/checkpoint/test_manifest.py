"""A manifest comes back as it was written; what is not one, or points where it must not, is refused in words."""

import json
from pathlib import Path

import pytest
import torch

from dsllm.checkpoint.manifest import read_manifest, tensor_name
from dsllm.errors import CheckpointError
from dsllm.slices import WEIGHTS, Box, ParameterSlice, Region, whole
from tests.helpers.checkpoints import save_slices


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one parameter [4, 3] that two ranks cut along its columns."""
    weights = torch.arange(12.0).view(4, 3)
    regions = [Region(Box((0, 0), (4, 2)), 0, 8), Region(Box((0, 2), (4, 3)), 0, 4)]
    ranks = [
        [
            ParameterSlice(
                name="w", shape=(4, 3), region=r, tensors={WEIGHTS: r.of(weights), "m": r.of(weights)}, expert=3
            )
        ]
        for r in regions
    ]
    return save_slices(tmp_path, ranks)


def edit(folder: Path, change) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    change(raw)
    (folder / "manifest.json").write_text(json.dumps(raw))


def test_what_is_written_is_read(folder: Path):
    manifest = read_manifest(folder)
    assert manifest.parameters["w"].shape == (4, 3) and manifest.parameters["w"].keys == (WEIGHTS, "m")
    assert manifest.parameters["w"].expert == 3 and manifest.parameters["w"].trainable
    regions = [piece.region((4, 3)) for part in manifest.parts for piece in part.slices]
    assert regions == [Region(Box((0, 0), (4, 2)), 0, 8), Region(Box((0, 2), (4, 3)), 0, 4)]
    assert manifest.model.precision == "fp32" and manifest.progress == {"step": 4}


def test_files_of_weights_come_first_and_each_once(folder: Path):
    manifest = read_manifest(folder)
    weights = ["weights-00000.safetensors", "weights-00001.safetensors"]
    assert [file.name for file in manifest.files("weights")] == weights
    optimizer = ["optimizer-00000.safetensors", "optimizer-00001.safetensors"]
    assert [file.name for file in manifest.files("all")] == weights + optimizer


def test_tensor_names():
    assert tensor_name("w", Region(whole((4, 3)), 5, 9), (4, 3), WEIGHTS) == "w@5/weights"
    assert tensor_name("w", Region(Box((0, 2), (4, 3)), 1, 4), (4, 3), "m") == "w@0,2:1/m"
    assert tensor_name("s", Region(whole(()), 0, 1), (), WEIGHTS) == "s@0/weights"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda raw: raw.pop("format_version"), "is not a readable checkpoint manifest"),
        (
            lambda raw: raw.update(format_version=3),
            "has format version 3; this dsllm reads versions 1 and 2: update dsllm",
        ),
        (lambda raw: raw.pop("progress"), r"is not a checkpoint manifest of version 2: .*progress"),
        (lambda raw: raw.update(unknown=1), r"is not a checkpoint manifest of version 2: .*unknown"),
        (lambda raw: raw["progress"].update(loss=float("nan")), "NaN is not a number in JSON"),
        (lambda raw: raw["parameters"]["w"]["scalars"].update(step=float("inf")), "Infinity is not a number in JSON"),
        (
            lambda raw: raw["parts"][0]["weights"].update(name="../../weights.safetensors"),
            "String should match pattern",
        ),
        (lambda raw: raw["parts"][0]["slices"][0].update(name="v"), "is not a part of any of its parameters"),
        (lambda raw: raw["parts"][0]["slices"][0].update(stop=9), "is not a part of any of its parameters"),
        (lambda raw: raw["parts"][0]["slices"][0].update(start=8), "is not a part of any of its parameters"),
        (lambda raw: raw["parts"][0]["slices"][0]["box"].update(stop=[4, 4]), "is not a part of any of its parameters"),
        (lambda raw: raw["parts"][0]["slices"][0]["box"].update(stop=[4]), "is not a part of any of its parameters"),
    ],
)
def test_what_is_not_a_manifest_is_refused(folder: Path, change, problem: str):
    edit(folder, change)
    with pytest.raises(CheckpointError, match=f"(?s){problem}") as refusal:
        read_manifest(folder)
    assert str(folder / "manifest.json") in str(refusal.value)


def test_a_newer_format_says_who_wrote_it(folder: Path):
    edit(folder, lambda raw: raw.update(format_version=9, versions={"dsllm": "7.1"}))
    with pytest.raises(CheckpointError, match=r"or use the one that wrote it \(dsllm 7\.1\)"):
        read_manifest(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format_version": 2}'])
def test_any_other_file_is_refused(folder: Path, content: str):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match="is not a"):
        read_manifest(folder)
