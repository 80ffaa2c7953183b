"""A run directory with one checkpoint, as training would leave it, and the prepared data it names."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dsllm.checkpoint.find import CHECKPOINTS
from dsllm.checkpoint.manifest import ModelRecord
from dsllm.config.load import run_to_dict
from dsllm.config.model import ModelConfig
from dsllm.config.run import RunConfig, RunSection
from dsllm.model.transformer import Transformer
from dsllm.slices import WEIGHTS, ParameterSlice, Region, whole
from tests.helpers.checkpoints import save_slices
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


def save_run(
    config: RunConfig, precision: str = "fp32", fields: Mapping[str, Any] | None = None
) -> tuple[Path, Transformer]:
    """Write a checkpoint of random weights and moments into the run's directory; returns the directory and the model.

    Args:
        fields: other values for fields of the manifest
    """
    model = random_model(config.model)
    directory = Path(config.run.directory)
    slices = [
        ParameterSlice(
            name=name,
            shape=tuple(p.shape),
            region=Region(whole(tuple(p.shape)), 0, p.numel()),
            tensors={
                WEIGHTS: p.detach().reshape(-1),
                "exp_avg": torch.full((p.numel(),), 0.5),
                "exp_avg_sq": torch.full((p.numel(),), 0.25),
            },
            scalars={"step": float(STEP)},
        )
        for name, p in model.named_parameters()
    ]
    record = ModelRecord(config=run_to_dict(config)["model"], context_length=config.context_length, precision=precision)
    save_slices(directory / CHECKPOINTS, [slices], STEP, config, {"model": record, **(fields or {})})
    return directory, model.eval()
