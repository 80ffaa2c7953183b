"""Damaged prepared data is a named error for every reader, or read as it was: each file in every way, seeded."""

import random
from pathlib import Path

import pytest
import torch

from dsllm.data.manifest import check_shards, check_tokenizer, load_manifest
from dsllm.data.training import TrainingBatches
from dsllm.data.validation import ValidationBatches
from dsllm.data.verify import check_content, hashed_shards
from dsllm.errors import DsllmError
from tests.helpers.damage import DAMAGE
from tests.helpers.prepared import counting_documents, write_prepared
from tests.helpers.training_data import T, at_step, data, training

FILES = [
    *("manifest.json", "manifest.json.sha256", "train-a-00000.bin", "train-a-00001.idx", "validation-a-00000.bin"),
    "tokenizer/tokenizer.json",
]


def prepare(directory: Path) -> None:
    write_prepared(
        directory, {"a": [counting_documents(300), counting_documents(200, first=301)]}, {"a": [counting_documents(90)]}
    )


def read_all(directory: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What training and validation read after the checks of a start, and those of `data.verify: start`."""
    manifest = load_manifest(directory)
    check_tokenizer(directory, manifest)
    check_shards(directory, manifest)
    check_content(directory, hashed_shards(manifest))
    batches: TrainingBatches = training(directory, manifest, data())
    held_out = ValidationBatches(directory, manifest, sequence_length=T, micro_batch_sequences=2)
    trained = [batch.targets for step in range(7) for batch in batches.step(at_step(step))]
    return trained, [batch.targets for batch in held_out]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_a_named_error_or_has_no_effect(tmp_path: Path, kind: str, file: str):
    """3 inputs for each file and kind, 234 in all."""
    source = random.Random(f"{kind} {file}")
    prepare(tmp_path / "sound")
    wanted = read_all(tmp_path / "sound")
    for attempt in range(3):
        directory = tmp_path / str(attempt)
        prepare(directory)
        DAMAGE[kind](directory / file, source)
        before = {path: path.lstat().st_mtime_ns for path in directory.rglob("*")}
        try:
            found = read_all(directory)
        except DsllmError as error:
            assert str(directory) in str(error)
        else:  # an .idx is read for its header alone, and a checksum may be missing
            assert file.endswith((".idx", ".sha256"))
            assert all(
                torch.equal(a, b)
                for mine, theirs in zip(wanted, found, strict=True)
                for a, b in zip(mine, theirs, strict=True)
            )
        assert {path: path.lstat().st_mtime_ns for path in directory.rglob("*")} == before
