"""Writes a Hugging Face folder: config.json, generation_config.json, safetensors in shards and the tokenizer."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsllm.checkpoint.hugging_face_config import architecture_for, config_to_json
from dsllm.checkpoint.hugging_face_files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from dsllm.checkpoint.hugging_face_names import hugging_face_tensors, real_shape
from dsllm.checkpoint.hugging_face_tokenizer import write_tokenizer
from dsllm.checkpoint.whole_folder import whole_folder
from dsllm.config.model import ModelConfig
from dsllm.errors import CheckpointError
from dsllm.parameters import Parameter, parameter_table
from dsllm.slices import WEIGHTS, Region, whole

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class WeightReader(Protocol):
    """Where the weights come from: a checkpoint, or another Hugging Face folder."""

    def read(self, name: str, key: str, region: Region) -> Tensor:
        """The fp32 values of a region of the parameter `name`, 1-d."""
        ...


@dataclass(frozen=True, kw_only=True)
class Export:
    """What to write, and how."""

    config: ModelConfig
    """The model, its vocabulary resolved."""
    context_length: int
    """Longest sequence it is made for, in tokens."""
    end_of_text_id: int
    begin_of_text_id: int | None = None
    """What documents begin with; None (default): their text, so that a prompt follows an end-of-text."""
    dtype: Dtype = "float32"
    shard_bytes: int = 5 * 10**9
    """Largest weight file. Writing takes as much memory, and that of the largest parameter."""
    tokenizer: Path | None = None
    """Folder of the tokenizer to ship with the model."""
    replace: bool = False
    """Replace a model that is in the folder already, once this one is complete."""


def export_hugging_face(reader: WeightReader, export: Export, folder: Path) -> list[Path]:
    """Write a model as a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads; returns its files.

    The model is there complete, or not at all.

    Raises:
        CheckpointError: the folder exists and is not empty, no Hugging Face architecture computes what the model computes,
            or the disk refuses.
    """
    architecture_for(export.config)  # refuses before anything is written
    with whole_folder(folder, CONFIG_FILE, _is_exported, export.replace) as aside:
        try:
            _write_files(reader, export, aside)
        except SafetensorError as error:  # a full disk, for example
            raise CheckpointError(f"{folder}: could not be written: {error}") from error
    return sorted(folder.iterdir())


_FILES = {
    *(CONFIG_FILE, "generation_config.json", SINGLE_FILE, INDEX_FILE, "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
}


def _is_exported(name: str) -> bool:
    """Whether a file in the folder of a model may be replaced by those of another export."""
    return name in _FILES or re.fullmatch(r"(model-)?\d+(-of-\d+)?\.safetensors", name) is not None


def _write_files(reader: WeightReader, export: Export, folder: Path) -> None:
    _write_weights(reader, export, folder)
    _write_json(folder / CONFIG_FILE, _config_json(export))
    ends = {"bos_token_id": _first_id(export), "eos_token_id": export.end_of_text_id}
    _write_json(folder / "generation_config.json", ends)
    if export.tokenizer is None:
        return
    try:
        write_tokenizer(export.tokenizer, folder, export.context_length)
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library raises this class itself, for a full disk too
            raise
        raise CheckpointError(f"the tokenizer in {export.tokenizer} could not be written: {error}") from error


def _config_json(export: Export) -> dict[str, object]:
    fields = config_to_json(export.config, export.context_length, export.dtype, export.end_of_text_id)
    return {**fields, "bos_token_id": _first_id(export)}


def _first_id(export: Export) -> int:
    """What generation starts from."""
    return export.end_of_text_id if export.begin_of_text_id is None else export.begin_of_text_id


def _write_weights(reader: WeightReader, export: Export, folder: Path) -> None:
    """Fill one file after the other; they get their names at the end, because those contain the number of files."""
    files: list[tuple[Path, list[str]]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0
    for name, tensor in _tensors(reader, export):
        if shard and size + tensor.nbytes > export.shard_bytes:
            files.append(_write_shard(folder / f"{len(files)}.safetensors", shard))
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    files.append(_write_shard(folder / f"{len(files)}.safetensors", shard))
    if len(files) == 1:
        files[0][0].rename(folder / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(files, 1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _tensors(reader: WeightReader, export: Export) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the Hugging Face model, one by one, in the dtype of the export."""
    table = {parameter.name: parameter for parameter in parameter_table(export.config, export.context_length)}
    for tensor in hugging_face_tensors(architecture_for(export.config).model_type, export.config):
        parts = [_converted(_read(reader, table[name]), name, export.dtype) for name in tensor.parts]
        yield tensor.name, tensor.layout.join(parts).contiguous()


def _read(reader: WeightReader, parameter: Parameter) -> Tensor:
    """One of our parameters without its padding rows."""
    shape = real_shape(parameter)
    region = Region(whole(parameter.shape), 0, math.prod(shape))  # padding rows are the last ones
    return reader.read(parameter.name, WEIGHTS, region).view(shape)


def _converted(values: Tensor, name: str, dtype: Dtype) -> Tensor:
    converted = values.to(DTYPES[dtype])
    if not converted.isfinite().all() and values.isfinite().all():
        largest = float(values.abs().max())
        raise CheckpointError(f"{name}: contains {largest:.4g}, which {dtype} cannot hold: export with another --dtype")
    return converted


def _write_shard(path: Path, shard: dict[str, Tensor]) -> tuple[Path, list[str]]:
    save_file(shard, path, metadata={"format": "pt"})
    return path, list(shard)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
