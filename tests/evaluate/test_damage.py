"""A damaged checkpoint or run directory is opened as the next sound one, or refused in words: by every reader of models."""

import dataclasses
import random
import shutil
from pathlib import Path

import pytest
import torch

from dsllm.checkpoint.find import CHECKPOINTS
from dsllm.checkpoint.hugging_face_export import Export, export_hugging_face
from dsllm.config.model import ModelConfig
from dsllm.errors import CheckpointError, DsllmError
from dsllm.evaluate.load import load_model, open_saved
from dsllm.evaluate.model_tokenizer import find_tokenizer
from dsllm.files import sha256_of_folder
from tests.helpers.checkpoints import RUN, edit_manifest
from tests.helpers.damage import DAMAGE
from tests.helpers.saved_run import STEP, save_run

MODEL = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, mlp_size=24, vocab_size=100)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints after steps 7 and 9, the older one with other weights."""
    directory = tmp_path_factory.mktemp("source") / "run"
    config = dataclasses.replace(RUN, run=dataclasses.replace(RUN.run, directory=str(directory)), model=MODEL)
    save_run(config)
    older = directory / CHECKPOINTS / f"step-{STEP:08d}"
    kept = older.rename(directory / "kept")
    save_run(dataclasses.replace(config, model=dataclasses.replace(MODEL, initial_std=0.5)))
    newer = older.rename(older.with_name("step-00000009"))
    edit_manifest(newer, lambda raw: raw["progress"].update(step=9))
    kept.rename(older)
    return directory


def names_and_times(directory: Path) -> dict[Path, tuple[int, int]]:
    """What is in a folder; links and devices are not followed."""
    found = {path: path.lstat() for path in directory.rglob("*")}
    return {path: (status.st_size, status.st_mtime_ns) for path, status in found.items()}


def read(directory: Path, to: Path) -> tuple[int | None, torch.Tensor]:
    """Open, load and export the model of a run; the step and a weight of it. What the run contains is not changed."""
    before = names_and_times(directory)
    saved = open_saved(directory, lambda line: None)
    weight = load_model(saved, "fp32", CPU).embed.weight.detach()
    shutil.rmtree(to, ignore_errors=True)
    export = Export(config=saved.config, context_length=saved.context_length, end_of_text_id=0)
    export_hugging_face(saved.reader, export, to)
    assert names_and_times(directory) == before
    return saved.step, weight


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over(source: Path, tmp_path: Path, kind: str):
    """Every file of it that a reader of weights needs, 3 times: 6 inputs for each kind."""
    generator, (_, newest) = random.Random(kind), read(source, tmp_path / "hf")
    for attempt in range(3):
        for name in ("manifest.json", "weights-00000.safetensors"):
            run = tmp_path / f"{attempt}-{name}" / "run"
            shutil.copytree(source, run)
            newer = run / CHECKPOINTS / "step-00000009"
            DAMAGE[kind](newer / name, generator)
            step, weight = read(run, tmp_path / "hf")
            assert step == STEP and not torch.equal(weight, newest)
            shutil.rmtree(run / CHECKPOINTS / f"step-{STEP:08d}")
            for path in (run, newer):
                with pytest.raises(CheckpointError) as refusal:
                    open_saved(path, lambda line: None)
                assert str(run) in str(refusal.value)


def test_damage_to_the_optimizers_state_does_not_concern_readers_of_weights(source: Path, tmp_path: Path):
    generator = random.Random(1)
    wanted = read(source, tmp_path / "hf")
    for kind, damage in DAMAGE.items():
        run = tmp_path / kind / "run"
        shutil.copytree(source, run)
        damage(run / CHECKPOINTS / "step-00000009" / "optimizer-00000.safetensors", generator)
        step, weight = read(run, tmp_path / "hf") if kind not in ("fifo", "huge") else wanted
        assert step == 9 and torch.equal(weight, wanted[1])


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_tokenizer_of_a_run_is_refused(source: Path, tmp_path: Path, kind: str):
    run = tmp_path / "run"
    shutil.copytree(source, run)
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "tokenizer.json").write_text('{"model": {}}' * 30)
    (run / "tokenizer" / "info.json").write_text('{"kind": "byte_bpe"}')
    sha256 = sha256_of_folder(run / "tokenizer")
    edit_manifest(run / CHECKPOINTS / "step-00000009", lambda raw: raw.update(tokenizer_sha256=sha256))
    assert find_tokenizer(open_saved(run, print)) == run / "tokenizer"
    DAMAGE[kind](run / "tokenizer" / "tokenizer.json", random.Random(kind))
    with pytest.raises(DsllmError, match="tokenizer"):
        find_tokenizer(open_saved(run, print))
