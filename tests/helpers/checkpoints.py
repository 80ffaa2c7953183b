"""Small checkpoints, written piece by piece as the ranks of a run would."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsllm.checkpoint.find import checkpoint_name
from dsllm.checkpoint.manifest import MANIFEST_FILE, CheckpointManifest, ModelRecord
from dsllm.checkpoint.seal import sealed
from dsllm.checkpoint.write import merge_parameters, publish_checkpoint, start_checkpoint, write_slices
from dsllm.config.load import run_to_dict
from dsllm.config.migrate import CONFIG_VERSION, changed_fields
from dsllm.config.model import ModelConfig
from dsllm.config.run import RunConfig, RunSection
from dsllm.slices import ParameterSlice

RUN = RunConfig(run=RunSection(name="tiny", directory="runs/tiny"), model=ModelConfig(vocab_size=300))


def save_slices(
    directory: Path,
    ranks: Sequence[Sequence[ParameterSlice]],
    step: int = 4,
    config: RunConfig = RUN,
    fields: Mapping[str, Any] | None = None,
) -> Path:
    """Publish a checkpoint to which each rank contributed these slices; returns its folder.

    Args:
        fields: other values for fields of the manifest
    """
    aside = start_checkpoint(directory, step)
    written = [write_slices(aside, rank, slices) for rank, slices in enumerate(ranks)]
    tree = run_to_dict(config)
    manifest = CheckpointManifest(
        progress={"step": step},
        engine={"loss_scaler": {}},
        model=ModelRecord(config=tree["model"], context_length=config.context_length, precision="fp32"),
        config=tree,
        config_version=CONFIG_VERSION,
        config_changed=changed_fields(config),
        deepspeed={},
        versions={},
        parameters=merge_parameters([parameters for _, parameters in written]),
        parts=tuple(part for part, _ in written),
    )
    final = directory / checkpoint_name(step)
    publish_checkpoint(aside, final, dataclasses.replace(manifest, **fields or {}))
    return final


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object], *, resealed: bool = True) -> None:
    """Change a checkpoint's manifest.

    Args:
        resealed: with the checksum of the new content, as somebody would write it who knows the format; False: with the old
            checksum, as damage and text editors leave it
    """
    path = folder / MANIFEST_FILE
    raw = json.loads(path.read_text())
    if not resealed:
        change(raw)
        path.write_text(json.dumps(raw, separators=(",", ":")))
        return
    raw.pop("sha256", None)
    change(raw)
    path.write_bytes(sealed(json.dumps(raw).encode()))
