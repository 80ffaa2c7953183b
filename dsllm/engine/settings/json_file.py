"""Reads the DeepSpeed JSON that a run names."""

import os
from pathlib import Path
from typing import Any

from dsllm.config.paths import find_file, presets_directory, searched
from dsllm.config.suggest import did_you_mean
from dsllm.errors import ConfigError
from dsllm.untrusted_files import UntrustedFileError, parse_json, read_bounded

MOST_BYTES = 2**20


def read_deepspeed_json(name: str, yaml_folder: Path | None = None) -> dict[str, Any]:
    """The DeepSpeed JSON that a run names.

    Args:
        yaml_folder: folder of the run's YAML file; None (default): the run has no file.
    Raises:
        ConfigError: the file is missing or not JSON, is not an object, gives a key twice, or has a number that is not finite.
    """
    path = find_file(name, yaml_folder)
    if path is None:
        raise ConfigError(f"deepspeed: {_not_found(name, yaml_folder)}")
    try:
        value = parse_json(read_bounded(path, MOST_BYTES), unique_keys=True)
    except UntrustedFileError as error:
        text = str(error).removeprefix("is not readable JSON: ")
        raise ConfigError(f"deepspeed: {path}: is not readable JSON: {text}") from error
    except OSError as error:
        raise ConfigError(f"deepspeed: {path}: cannot be read: {error.strerror or error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"deepspeed: {path}: contains a {type(value).__name__}; it must be an object")
    return value


def _not_found(name: str, yaml_folder: Path | None) -> str:
    """Why there is no such file, and which of the shipped ones was perhaps meant."""
    if os.path.isdir(name):  # not Path.is_dir(): it raises where the name is too long
        return f"{name} is a folder: name a DeepSpeed JSON in it"
    shipped = {file.stem: file for file in sorted((presets_directory() / "ds_configs").glob("*.json"))}
    hint = did_you_mean(Path(name).stem, shipped)
    for stem, file in shipped.items():
        hint = hint.replace(f"'{stem}'", f"'{file.parent.name}/{file.name}'")
    return f"file not found: {searched(name[:200], yaml_folder)}{hint}"
