"""A run that starts from a model takes its architecture from there, and is refused where it gives another one."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dsllm.checkpoint.architecture import ALWAYS, NOT_COMPARED, ROTARY
from dsllm.checkpoint.hugging_face import HuggingFaceReader
from dsllm.checkpoint.hugging_face_export import Export, export_hugging_face
from dsllm.cli.train import main
from dsllm.config import load
from dsllm.config.model import ModelConfig
from dsllm.config.yaml_file import write_yaml
from dsllm.errors import CheckpointError, ConfigError
from dsllm.run_directory import RUN_FILE
from dsllm.session.run_file import load_run
from tests.helpers.jobs import train
from tests.helpers.models import CONTEXT, GPT2, LLAMA, NEOX, SHAPES, WeightsOf, random_model
from tests.helpers.preparing import golden_run
from tests.helpers.saved_run import MODEL, save_run
from tests.helpers.tiny_job import budget, prepare_folder

KINDS = {"llama": SHAPES["llama-scaled"], "gpt2": GPT2, "gpt_neox": NEOX, "qwen2": SHAPES["qwen2"]}


def exported(folder: Path, config: ModelConfig) -> Path:
    settings = Export(config=config, context_length=CONTEXT, end_of_text_id=3)
    export_hugging_face(WeightsOf(random_model(config)), settings, folder)
    return folder


def saved(directory: Path, config: ModelConfig = MODEL) -> Path:
    """A run directory with a checkpoint of this model."""
    run = golden_run(sequence_length=CONTEXT)
    run = dataclasses.replace(run, run=dataclasses.replace(run.run, directory=str(directory)), model=config)
    return save_run(run)[0]


def written(folder: Path, model: dict[str, Any]) -> str:
    """A run's YAML with this section `model`."""
    run = {"run": {"directory": str(folder / "new")}, "data": {"sequence_length": CONTEXT}, "model": model}
    (folder / "new.yaml").write_text(yaml.safe_dump(run))
    return str(folder / "new.yaml")


def resolved(config: ModelConfig) -> dict[str, Any]:
    """What a model computes with, whether it is written out or follows from other fields."""
    fields = dataclasses.asdict(config) | {"num_kv_heads": config.kv_heads, "head_size": config.head_width}
    kept = {name: fields[name] for name in (*ALWAYS, *ROTARY)} | {"mlp_size": config.mlp_width}
    return {name: value for name, value in kept.items() if config.positions == "rope" or name not in ROTARY}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hugging_face_folder_alone_gives_the_architecture(kind: str, tmp_path: Path):
    source = exported(tmp_path / "hf", KINDS[kind])
    model = load_run(written(tmp_path, {"init_from": str(source), "dropout": 0.1})).model
    assert resolved(model) == resolved(HuggingFaceReader(source).model_config) == resolved(KINDS[kind])
    assert model.dropout == 0.1
    assert model.context_length == (CONTEXT if kind == "gpt2" else None)  # of rotary models each run chooses it


@pytest.mark.parametrize("config", [MODEL, dataclasses.replace(GPT2, vocab_size=320)], ids=["llama", "gpt2"])
def test_a_run_and_its_checkpoint_alone_give_the_architecture(config: ModelConfig, tmp_path: Path):
    directory = saved(tmp_path / "run", config)
    for source in (directory, *(directory / "checkpoints").iterdir()):
        assert resolved(load_run(written(tmp_path, {"init_from": str(source)})).model) == resolved(config)


def test_a_damaged_newest_checkpoint_is_skipped(tmp_path: Path):
    directory = saved(tmp_path / "run")
    (newest,) = (directory / "checkpoints").iterdir()
    shutil.copytree(newest, newest.with_name("step-00000009"))
    (newest.with_name("step-00000009") / "manifest.json").write_text("{")
    assert load_run(written(tmp_path, {"init_from": str(directory)})).model.vocab_size == MODEL.vocab_size


CHANGES: dict[str, dict[str, Any]] = {
    "num_layers": {"num_layers": 4},
    "hidden_size": {"hidden_size": 96},
    "num_heads": {"num_heads": 4, "head_size": 12},
    "num_kv_heads": {"num_kv_heads": 3},
    "head_size": {"head_size": 16},
    "mlp_size": {"mlp_size": 96},
    "vocab_size": {"vocab_size": 199},
    "norm": {"norm": "layernorm"},
    "norm_epsilon": {"norm_epsilon": 1e-6},
    "positions": {"positions": "learned", "rope_scaling": None},
    "mlp": {"mlp": "gelu"},
    "parallel_residual": {"parallel_residual": True},
    "tie_embeddings": {"tie_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "attention_output_bias": {"attention_output_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "qk_norm": {"qk_norm": True},
    "rope_theta": {"rope_theta": 1e6},
    "rope_fraction": {"rope_fraction": 0.5},
    "rope_scaling": {"rope_scaling": {"factor": 2.0}},
}
"""One change of each field that the forward pass reads."""


def test_each_field_of_a_model_has_a_change_here_or_a_reason_why_it_may_differ():
    assert {*CHANGES} | {*NOT_COMPARED} == {field.name for field in dataclasses.fields(ModelConfig)}


@pytest.mark.parametrize("source", ["hf", "run"])
def test_every_field_that_differs_is_named_with_what_to_write(source: str, tmp_path: Path):
    config = dataclasses.replace(LLAMA, rope_theta=500.0)
    folder = exported(tmp_path / "hf", config) if source == "hf" else saved(tmp_path / "run", config)
    for field, change in CHANGES.items():
        with pytest.raises(
            CheckpointError, match=f"model.init_from {folder}: is another model than the run's:"
        ) as refusal:
            load_run(written(tmp_path, {"init_from": str(folder), **change}))
        text = str(refusal.value)
        assert f"\n- model.{field}: " in text, text
        section = yaml.safe_load(text.partition("or write\n")[2])
        assert resolved(load_run(written(tmp_path, section["model"])).model) == resolved(config)


def test_learned_positions_of_another_length_are_named(tmp_path: Path):
    source = exported(tmp_path / "hf", GPT2)
    with pytest.raises(CheckpointError, match=rf"model\.context_length: {CONTEXT} there, 96 here"):
        load_run(written(tmp_path, {"init_from": str(source), "context_length": 96}))


def test_a_run_with_checkpoints_keeps_its_architecture_when_the_folder_is_gone(tmp_path: Path):
    source = exported(tmp_path / "hf", LLAMA)
    file = written(tmp_path, {"init_from": str(source)})
    first = load_run(file)
    saved(tmp_path / "new", first.model)
    (tmp_path / "new" / RUN_FILE).write_text(write_yaml(load.run_to_dict(first)))
    shutil.rmtree(source)
    assert load_run(file) == first
    shutil.rmtree(tmp_path / "new" / "checkpoints")
    with pytest.raises(CheckpointError, match=rf"model\.init_from {source}: no such folder"):
        load_run(file)


def test_a_vocabulary_that_is_padded_further_than_ours_is_taken_as_it_is(tmp_path: Path):
    """As those of the larger Pythias: 50,432 and 50,688 rows for the same tokenizer."""
    source = exported(tmp_path / "hf", dataclasses.replace(NEOX, vocab_size=640))
    shape = {"num_layers": 3, "hidden_size": 64, "num_heads": 4, "mlp_size": 100}
    model = load_run(written(tmp_path, {"size": "pythia-14m", "init_from": str(source), **shape})).model
    assert model.vocab_size == 640 and resolved(model) == resolved(HuggingFaceReader(source).model_config)


def test_without_a_source_nothing_changes(tmp_path: Path):
    file = written(tmp_path, {"num_layers": 3})
    assert load_run(file) == load.load_run(file)
    with pytest.raises(ConfigError, match="init_from"):
        load_run(written(tmp_path, {"init_from": 5}))


HUGE = {"num_hidden_layers": 10**8, "hidden_size": 2**20, "vocab_size": 10**12, "intermediate_size": 10**15}
"""A model that no memory holds."""


@pytest.mark.parametrize("field", HUGE)
def test_an_absurd_size_ends_in_one_line_at_once(field: str, tmp_path: Path):
    source = exported(tmp_path / "hf", LLAMA)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {field: HUGE[field]}))
    with pytest.raises(CheckpointError, match=rf"^{source}/config\.json: describes .* only") as refusal:
        load_run(written(tmp_path, {"init_from": str(source)}))
    assert "\n" not in str(refusal.value)
    with pytest.raises(CheckpointError, match="describes"):
        HuggingFaceReader(source)


def test_the_dry_run_counts_the_parameters_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, size = exported(tmp_path / "hf", LLAMA), sum(p.numel() for p in random_model(LLAMA).parameters())
    assert main([written(tmp_path, {"init_from": str(source)}), "--dry-run"]) == 0
    assert f"# parameters   {size:,} (" in capsys.readouterr().out


@pytest.mark.slow
def test_whole_runs_start_from_a_run_and_from_a_hugging_face_folder(tmp_path: Path):
    """`model: {init_from: FOLDER}` and the tokenizer in it are all that a run needs."""
    folder = prepare_folder(tmp_path)
    run = yaml.safe_load((folder / "tiny.yaml").read_text())
    config = ModelConfig(num_layers=1, hidden_size=32, num_heads=2, vocab_size=320, rope_theta=500.0)
    settings = {
        "config": config, "context_length": CONTEXT, "end_of_text_id": 0,
        "tokenizer": folder / "runs" / "tiny" / "tokenizer",
    }  # fmt: skip
    model = random_model(config)
    export_hugging_face(WeightsOf(model), Export(**settings), folder / "hf")
    sources = {"runs/tiny": ("runs/tiny/tokenizer", 48), "hf": ("hf", 32)}
    for name, (tokenizer, width) in sources.items():
        run |= {"run": {"name": "new", "directory": f"new/{name}"}, "model": {"init_from": name}}
        run["tokenizer"] = {"kind": "pretrained", "path": tokenizer}
        run["data"]["directory"] = f"new-data/{name}"
        (folder / "new.yaml").write_text(yaml.safe_dump(run))
        codes, output = train(folder, 1, ["new.yaml", budget(2)])
        assert codes == [0], output
        assert f"starting from the weights of {name}" in output
        trained = yaml.safe_load((folder / "new" / name / RUN_FILE).read_text())["model"]
        assert trained["hidden_size"] == width
    assert torch.equal(HuggingFaceReader(folder / "hf").read_whole("embed.weight"), model.embed.weight)
