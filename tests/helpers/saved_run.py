"""A run directory with one checkpoint, as training would leave it, and the prepared data it names."""

import dataclasses
from pathlib import Path

from dsllm.checkpoint.find import CHECKPOINTS
from dsllm.checkpoint.manifest import CheckpointManifest
from dsllm.checkpoint.write import checkpoint_name, publish_checkpoint, start_checkpoint, write_slices
from dsllm.config.load import run_to_dict
from dsllm.config.model import ModelConfig
from dsllm.config.run import RunConfig, RunSection
from dsllm.model.transformer import Transformer
from dsllm.slices import WEIGHTS, ParameterSlice, Region, whole
from tests.helpers.models import CONTEXT, random_model
from tests.helpers.preparing import golden_run, prepared

MODEL = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, mlp_size=64, vocab_size=320)
STEP = 7


def prepare_golden(directory: Path) -> RunConfig:
    """A run over the golden text, its data prepared in the directory."""
    config = golden_run(sequence_length=CONTEXT)
    prepared(config, directory / "data")
    return dataclasses.replace(
        config,
        run=RunSection(name="tiny", directory=str(directory / "run")),
        data=dataclasses.replace(config.data, directory=str(directory / "data")),
        model=MODEL,
    )


def save_run(config: RunConfig, precision: str = "fp32") -> tuple[Path, Transformer]:
    """Write a checkpoint of random weights into the run's directory; returns the directory and the model."""
    model = random_model(config.model)
    directory = Path(config.run.directory)
    aside = start_checkpoint(directory / CHECKPOINTS, STEP)
    slices = [
        ParameterSlice(
            name=name,
            shape=tuple(p.shape),
            region=Region(whole(tuple(p.shape)), 0, p.numel()),
            tensors={WEIGHTS: p.detach().reshape(-1)},
        )
        for name, p in model.named_parameters()
    ]
    record, parameters = write_slices(aside, 0, slices)
    manifest = CheckpointManifest(
        progress={"step": STEP},
        engine={"precision": precision},
        config=run_to_dict(config),
        deepspeed={},
        versions={},
        parameters=parameters,
        files=[record],
    )
    publish_checkpoint(aside, directory / CHECKPOINTS / checkpoint_name(STEP), manifest)
    return directory, model.eval()
