"""Loads the run of a command that trains: what its model section leaves out comes from the model that it starts from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsllm.checkpoint.find import list_checkpoints
from dsllm.checkpoint.source import another_model, architecture_fields, differences, model_in
from dsllm.config import load
from dsllm.config.model import ModelConfig
from dsllm.config.run import RunConfig
from dsllm.config.yaml_file import read_yaml
from dsllm.errors import ConfigError
from dsllm.run_directory import CHECKPOINTS, RUN_FILE


def load_run(path: str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The run in a YAML file (None: the embedded recipe), with `key.path=value` overrides on top.

    With `model.init_from`, the fields of the architecture that the run does not give are those of the model in that folder.

    Raises:
        ConfigError: the file is missing or unreadable, or anything in it does not fit; lists every problem.
        CheckpointError: model.init_from is not a model.
    """
    run = load.load_run(path, overrides, architecture_for)
    check_source(run)
    return run


def check_source(run: RunConfig) -> None:
    """Refuse a new run whose model is not the one that it starts from, before its data is prepared.

    Raises:
        CheckpointError: names the fields that differ.
    """
    source = run.model.init_from
    if source is None or list_checkpoints(Path(run.run.directory) / CHECKPOINTS):
        return
    found = model_in(Path(source))
    problems = differences(found, run.model, run.context_length)
    if problems:
        raise another_model(source, found, problems)


def architecture_for(init_from: str, run_directory: Path) -> dict[str, Any]:
    """The fields of the architecture of a run that starts from a model.

    A run that has checkpoints keeps the architecture in its run.yaml, wherever the folder that it once started from is now.

    Raises:
        CheckpointError: there is no such model.
    """
    if list_checkpoints(run_directory / CHECKPOINTS):
        saved = _saved_model(run_directory / RUN_FILE)
        if saved is not None:
            return saved
    return architecture_fields(model_in(Path(init_from)))


def _saved_model(file: Path) -> dict[str, Any] | None:
    """The fields of the architecture in a run.yaml; None: it cannot be read."""
    try:
        model = read_yaml(file)[0].get("model")
    except (ConfigError, OSError):
        return None
    known = {*architecture_fields(ModelConfig()), "context_length"}
    return {name: value for name, value in model.items() if name in known} if isinstance(model, dict) else None
