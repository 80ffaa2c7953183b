"""A saved model is found by any of its paths and loads with the weights that were saved."""

import dataclasses
import shutil
import time
from pathlib import Path

import pytest
import torch

from dsllm.checkpoint.find import CHECKPOINTS
from dsllm.checkpoint.hugging_face_export import Export, export_hugging_face
from dsllm.config.load import run_to_dict
from dsllm.config.migrate import CONFIG_VERSION
from dsllm.config.run import RunConfig
from dsllm.errors import CheckpointError
from dsllm.evaluate.load import load_model, open_saved
from dsllm.evaluate.model_tokenizer import find_tokenizer
from tests.helpers.checkpoints import edit_manifest
from tests.helpers.models import CONTEXT, tokens_for
from tests.helpers.saved_run import MODEL, STEP, prepare_golden, save_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with prepared data."""
    return prepare_golden(tmp_path_factory.mktemp("golden"))


def into(config: RunConfig, directory: Path, **model) -> RunConfig:
    """The same run with its directory elsewhere."""
    run = dataclasses.replace(config.run, directory=str(directory))
    return dataclasses.replace(config, run=run, model=dataclasses.replace(config.model, **model))


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_run_its_checkpoint_and_its_export_are_the_same_model(config: RunConfig, tied: bool, tmp_path: Path):
    directory, model = save_run(into(config, tmp_path / "run", tie_embeddings=tied))
    saved = open_saved(directory, print)
    tokenizer = find_tokenizer(saved)
    export = Export(config=saved.config, context_length=CONTEXT, end_of_text_id=0, tokenizer=tokenizer)
    export_hugging_face(saved.reader, export, tmp_path / "hf")
    tokens = tokens_for(MODEL)
    wanted = model(tokens)
    for path in (directory, directory / CHECKPOINTS / f"step-{STEP:08d}", tmp_path / "hf"):
        assert torch.equal(load_model(open_saved(path, print), "fp32", CPU)(tokens), wanted)
    assert saved.step == STEP and saved.run_directory == directory and not saved.is_hugging_face
    assert saved.run is not None and (saved.sequence_length, saved.document_mask) == (CONTEXT, False)
    hub = open_saved(tmp_path / "hf", print)
    assert hub.run is None and hub.is_hugging_face and hub.run_directory is None


@torch.no_grad()
def test_precisions(config: RunConfig, tmp_path: Path):
    directory, _ = save_run(into(config, tmp_path / "run"))
    saved, tokens = open_saved(directory, print), tokens_for(MODEL)
    low = load_model(saved, "bf16", CPU)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    mixed = load_model(saved, "fp32_compute_bf16", CPU)
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    assert mixed(tokens).dtype == low(tokens).dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_a_model_opens_without_its_optimizer_state_and_without_reading_it(config: RunConfig, tmp_path: Path):
    directory, model = save_run(into(config, tmp_path / "run"))
    (file,) = (directory / CHECKPOINTS).rglob("optimizer-*")
    file.write_bytes(b"garbled")
    saved = open_saved(directory, print)
    assert torch.equal(load_model(saved, "fp32", CPU).embed.weight, model.embed.weight)
    file.unlink()
    export = Export(config=saved.config, context_length=CONTEXT, end_of_text_id=0)
    export_hugging_face(open_saved(directory, print).reader, export, tmp_path / "hf")


@pytest.mark.parametrize("version", ["of today", "of a newer minor version"])
def test_a_model_opens_where_the_run_of_its_checkpoint_cannot_be_read(config: RunConfig, tmp_path: Path, version: str):
    """What evaluation needs to know about the run is still known."""
    config = into(config, tmp_path / "run")
    tree = run_to_dict(dataclasses.replace(config, data=dataclasses.replace(config.data, document_mask=True)))
    tree["train"] |= {"renamed": 3}
    major, minor = CONFIG_VERSION
    newer = {"config_version": (major, minor + 1), "config_changed": ("train.renamed",)}
    directory, model = save_run(config, fields={"config": tree} | (newer if "newer" in version else {}))
    lines: list[str] = []
    saved = open_saved(directory, lines.append)
    assert saved.run is None and not saved.is_hugging_face
    (line,) = lines
    assert "train.renamed" in line and "The model is opened without it" in line
    assert torch.equal(load_model(saved, "fp32", CPU).embed.weight, model.embed.weight)
    assert saved.data_directory == Path(config.data.directory or "") and saved.run_directory == directory
    assert (saved.sequence_length, saved.document_mask, saved.context_length) == (CONTEXT, True, CONTEXT)
    assert find_tokenizer(saved) == saved.data_directory / "tokenizer"
    del tree["data"]
    directory, _ = save_run(into(config, tmp_path / "other"), fields={"config": tree} | newer)
    saved = open_saved(directory, print)
    assert (saved.data_directory, saved.sequence_length, saved.document_mask) == (None, None, False)


def test_dropout_is_off(config: RunConfig, tmp_path: Path):
    directory, _ = save_run(into(config, tmp_path / "run", dropout=0.5))
    model = load_model(open_saved(directory, print), "fp32", CPU)
    tokens = tokens_for(MODEL)
    assert torch.equal(model.train()(tokens), model.eval()(tokens))


def test_paths_that_hold_no_model_are_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_saved(tmp_path / "nothing", print)
    with pytest.raises(CheckpointError, match="neither a run directory"):
        open_saved(tmp_path, print)


@pytest.mark.parametrize(
    "absurd",
    [{"num_layers": 10**8}, {"hidden_size": 2**20}, {"vocab_size": 10**12}, {"num_heads": 0}, {"mlp_size": 2**62}],
)
def test_a_config_of_absurd_size_is_refused_at_once(config: RunConfig, tmp_path: Path, absurd: dict[str, int]):
    """Before anything is allocated or listed for it."""
    directory, _ = save_run(into(config, tmp_path / "run"))
    (checkpoint,) = (directory / CHECKPOINTS).iterdir()
    edit_manifest(checkpoint, lambda raw: raw["model"]["config"].update(absurd))
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="config") as refusal:
        open_saved(directory, print)
    assert time.monotonic() - began < 1 and "\n" not in str(refusal.value)


def test_a_damaged_manifest_is_passed_over(config: RunConfig, tmp_path: Path):
    directory, model = save_run(into(config, tmp_path / "run"))
    (checkpoint,) = (directory / CHECKPOINTS).iterdir()
    newer = checkpoint.with_name("step-00000009")
    shutil.copytree(checkpoint, newer)
    edit_manifest(newer, lambda raw: raw["progress"].update(step=9, tokens=1), resealed=False)
    lines: list[str] = []
    saved = open_saved(directory, lines.append)
    assert saved.step == STEP and torch.equal(load_model(saved, "fp32", CPU).embed.weight, model.embed.weight)
    assert len(lines) == 1 and "does not match the checksum" in lines[0]
    with pytest.raises(CheckpointError, match="does not match the checksum"):
        open_saved(newer, print)


def test_weights_of_another_model_are_refused(config: RunConfig, tmp_path: Path):
    directory, _ = save_run(into(config, tmp_path / "run"))
    saved = open_saved(directory, print)
    wider = dataclasses.replace(saved, config=dataclasses.replace(saved.config, mlp_size=80))
    with pytest.raises(
        CheckpointError, match=r"6 parameters are not those of its config.*layers\.0\.mlp\.down\.weight"
    ):
        load_model(wider, "fp32", CPU)
