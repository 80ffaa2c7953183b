"""The architecture of a model that a new run may start from, found without reading weights and without torch."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsllm.checkpoint.architecture import ALWAYS, ROTARY, differences_in_function
from dsllm.checkpoint.find import candidates
from dsllm.checkpoint.hugging_face_files import (
    check_size,
    files_of_tensors,
    is_hugging_face_folder,
    read_architecture,
)
from dsllm.checkpoint.read_manifest import not_the_parameters_of, read_manifest
from dsllm.config.migrate import SavedConfig, read_model
from dsllm.config.model import ModelConfig
from dsllm.config.yaml_file import write_yaml
from dsllm.errors import CheckpointError

MOST_SHOWN = 8
"""Differences that an error lists."""


def model_in(source: Path) -> ModelConfig:
    """The model in a run directory (its newest checkpoint that can be read), a checkpoint or a Hugging Face folder.

    Raises:
        CheckpointError: there is none, or it is not implemented.
    """
    if not source.is_dir():
        raise CheckpointError(f"model.init_from {source}: no such folder")
    if is_hugging_face_folder(source):
        _, config = read_architecture(source)
        check_size(source, config, files_of_tensors(source))
        return config
    listed = candidates(source)
    for folder in listed[:-1]:
        try:
            return _model_of_checkpoint(folder)
        except CheckpointError:  # damaged; the run will report it
            continue
    return _model_of_checkpoint(listed[-1])


def architecture_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of a model that decide what it computes, as plain values. The context is one where positions are learned."""
    rotary = ROTARY if config.positions == "rope" else ()
    learned = ("context_length",) if config.positions == "learned" else ()
    values = dataclasses.asdict(config)
    return {name: values[name] for name in (*ALWAYS, *rotary, *learned)}


def differences(found: ModelConfig, wanted: ModelConfig, context_length: int) -> list[str]:
    """The fields in which a run's model differs from the one that it starts from, so that the weights mean something else.

    Args:
        context_length: the run's, in tokens; it matters where positions are learned
    """
    lines = differences_in_function(found, wanted)
    learned = found.positions == wanted.positions == "learned"
    if learned and found.context_length not in (None, context_length):  # None: its parameters' shapes are compared
        lines.append(f"model.context_length: {found.context_length} there, {context_length} here")
    return lines


def another_model(source: str, found: ModelConfig, problems: Sequence[str]) -> CheckpointError:
    """The error for a run whose model is not the one that it starts from: what differs, and what to write."""
    more = f"\n- and {len(problems) - MOST_SHOWN} more" if len(problems) > MOST_SHOWN else ""
    defaults = dataclasses.asdict(ModelConfig())
    fields = {name: value for name, value in architecture_fields(found).items() if value != defaults[name]}
    section = write_yaml({"model": {"init_from": source} | fields})
    return CheckpointError(
        f"model.init_from {source}: is another model than the run's:\n- "
        + "\n- ".join(problems[:MOST_SHOWN])
        + f"{more}\nTo use the model there, leave these fields out of `model`, or write\n{section.rstrip()}"
    )


def _model_of_checkpoint(folder: Path) -> ModelConfig:
    manifest = read_manifest(folder)
    config = read_model(
        SavedConfig(
            tree={"model": manifest.model.config},
            version=manifest.config_version,
            changed=manifest.config_changed,
            origin=str(folder),
        )
    )
    shapes = {name: record.shape for name, record in manifest.parameters.items()}
    problem = not_the_parameters_of(config, manifest.model.context_length, shapes)
    if problem:
        raise CheckpointError(f"{folder}: {problem}")
    return dataclasses.replace(config, context_length=manifest.model.context_length)
