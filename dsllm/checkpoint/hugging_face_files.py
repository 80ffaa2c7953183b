"""Finds the files of a Hugging Face folder: its config.json, and the file that contains each tensor. Needs no torch."""

from collections.abc import Mapping
from os.path import lexists
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dsllm.checkpoint.hugging_face_config import config_from_json
from dsllm.checkpoint.hugging_face_fields import shown
from dsllm.config.model import ModelConfig
from dsllm.errors import CheckpointError
from dsllm.parameters import parameter_table
from dsllm.untrusted_files import UntrustedFileError, check_regular, inside, read_json

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MOST_CONFIG_BYTES, _MOST_INDEX_BYTES = 2**20, 2**24
"""More than those of any published model, and parsed at once."""
_LONGEST_NAME = 255
"""Characters of a file's name in an index; file systems have the same limit."""


def is_hugging_face_folder(folder: Path) -> bool:
    """Whether a folder looks like one that can be read. Links to files are followed: the cache of the hub is made of them."""
    try:
        return (folder / CONFIG_FILE).is_file()
    except OSError:  # no permission to look into it
        return False


def read_architecture(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """The fields in config.json, and the model that they describe.

    Raises:
        CheckpointError: it cannot be read, or is not implemented.
    """
    fields = _read_object(folder / CONFIG_FILE, _MOST_CONFIG_BYTES)
    return fields, config_from_json(fields, str(folder / CONFIG_FILE))


def files_of_tensors(folder: Path) -> dict[str, Path]:
    """The file that contains each tensor. As in transformers, a single file is used before an index.

    Raises:
        CheckpointError: there are no weights in safetensors, or their names cannot be read.
    """
    if lexists(folder / "adapter_config.json"):
        raise CheckpointError(
            f"{folder}: has an adapter (adapter_config.json), which is not applied here: merge it into the model's weights, or "
            "remove it"
        )
    if lexists(folder / SINGLE_FILE):
        return dict.fromkeys(_names_in(folder / SINGLE_FILE), folder / SINGLE_FILE)
    if lexists(folder / INDEX_FILE):
        return _files_in_index(folder)
    try:
        pickled = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}") from error
    hint = f"; {pickled[0]} is a pickle, which is not loaded: convert it to safetensors first" if pickled else ""
    raise CheckpointError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")


def check_size(folder: Path, config: ModelConfig, files: Mapping[str, Path]) -> None:
    """Compare a model's size with that of its files, before anything is made in that size.

    Raises:
        CheckpointError: it is larger than what the files can contain.
    """
    origin = folder / CONFIG_FILE
    assert config.context_length is not None, "every config.json that is read gives one"
    if config.num_layers > len(files):
        raise CheckpointError(
            f"{origin}: describes {config.num_layers:,} layers, but the folder contains only {len(files):,} tensors"
        )
    num_elements = sum(p.num_real_elements for p in parameter_table(config, config.context_length))
    num_bytes = sum(_size(path) for path in set(files.values()))
    if num_elements > num_bytes:  # an element takes at least one byte, whatever its type
        raise CheckpointError(
            f"{origin}: describes {num_elements:,} parameters, but the weights in the folder take only {num_bytes:,} bytes"
        )


def open_safetensors(path: Path, framework: str = "pt") -> Any:
    """A weight file, opened so that its tensors can be read one by one.

    Args:
        framework: the kind of tensors that it gives; "np" loads no torch

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        check_regular(path)  # opening a pipe would wait for ever
        return safe_open(path, framework)
    except (OSError, SafetensorError, UntrustedFileError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _names_in(path: Path) -> list[str]:
    with open_safetensors(path, "np") as file:
        return list(file.keys())


def _files_in_index(folder: Path) -> dict[str, Path]:
    path = folder / INDEX_FILE
    weight_map = _read_object(path, _MOST_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map, which names the file of each tensor")
    found: dict[str, Path] = {}
    for file in weight_map.values():
        if not isinstance(file, str) or len(file) > _LONGEST_NAME:
            raise CheckpointError(f"{path}: weight_map: {shown(file)} is not a file name")
        if file not in found:
            try:
                found[file] = inside(folder, file)
            except UntrustedFileError as error:
                raise CheckpointError(f"{path}: weight_map: {error}") from error
    return {name: found[file] for name, file in weight_map.items()}


def _size(path: Path) -> int:
    try:
        return check_regular(path)
    except (OSError, UntrustedFileError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _read_object(path: Path, most_bytes: int) -> dict[str, Any]:
    try:
        content = read_json(path, most_bytes)
    except (OSError, UntrustedFileError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return content
