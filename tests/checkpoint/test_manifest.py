"""A manifest comes back as it was written."""

from pathlib import Path

import pytest
import torch

from dsllm.checkpoint.manifest import tensor_name
from dsllm.checkpoint.read_manifest import read_manifest
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
