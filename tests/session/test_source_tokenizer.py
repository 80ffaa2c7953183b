"""A run that starts from a model is warned of a tokenizer whose ids mean something else."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from dsllm.config.data import TokenizerConfig
from dsllm.data.manifest import load_manifest
from dsllm.session.source_tokenizer import other_tokenizer
from tests.helpers.preparing import golden_run, prepared


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data with a tokenizer of 300 ids."""
    directory = tmp_path_factory.mktemp("data") / "prepared"
    config = golden_run(sequence_length=64)
    prepared(dataclasses.replace(config, tokenizer=TokenizerConfig(kind="byte_bpe", vocab_size=300)), directory)
    return directory


def tokenizer_of(data: Path) -> Path:
    return data / load_manifest(data).tokenizer.directory


def changed(folder: Path) -> None:
    """Exchange the meaning of two ids."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, two = [token for token, index in vocabulary.items() if index in (270, 271)]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize("place", ["run/tokenizer", "hf"])
def test_the_same_tokenizer_is_fine_and_another_one_is_named_with_what_to_do(place: str, data: Path, tmp_path: Path):
    shutil.copytree(tokenizer_of(data), tmp_path / place)
    source = tmp_path / place.partition("/")[0]
    assert other_tokenizer(source, data) is None
    changed(tmp_path / place)
    warning = other_tokenizer(source, data)
    assert warning is not None and warning.startswith(
        f"2 of 300 token ids of {data} mean other tokens than in {tmp_path / place}"
    )
    assert f"tokenizer.path: {tmp_path / place}" in warning


def test_a_checkpoint_belongs_to_the_tokenizer_of_its_run(data: Path, tmp_path: Path):
    shutil.copytree(tokenizer_of(data), tmp_path / "run" / "tokenizer")
    changed(tmp_path / "run" / "tokenizer")
    assert "2 of 300" in (other_tokenizer(tmp_path / "run" / "checkpoints" / "step-00000004", data) or "")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"model": 5}', '{"model": {"vocab": [1]}}', '{"model": {"vocab": {}}}']
)
def test_without_a_tokenizer_to_compare_there_is_no_warning(content: str, data: Path, tmp_path: Path):
    assert other_tokenizer(tmp_path, data) is None
    assert other_tokenizer(tmp_path, tmp_path / "no data") is None
    (tmp_path / "tokenizer.json").write_text(content)
    assert other_tokenizer(tmp_path, data) is None
