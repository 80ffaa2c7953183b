"""Reads a Hugging Face folder like a checkpoint: Llama, GPT-2 or GPT-NeoX, from safetensors."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsllm.checkpoint.geometry import overlaps
from dsllm.checkpoint.hugging_face_config import config_from_json
from dsllm.checkpoint.hugging_face_names import (
    IGNORED_SUFFIXES,
    SAME,
    HuggingFaceTensor,
    base_prefix,
    hugging_face_tensors,
    real_shape,
)
from dsllm.config.model import ModelConfig
from dsllm.errors import CheckpointError
from dsllm.parameters import parameter_table
from dsllm.slices import WEIGHTS, Region, whole

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def is_hugging_face_folder(folder: Path) -> bool:
    """Whether a folder looks like one that `HuggingFaceReader` reads."""
    return (folder / "config.json").is_file()


class HuggingFaceReader:
    """The weights in a Hugging Face folder, under the names of dsllm. Reads only the regions that are requested."""

    def __init__(self, folder: Path):
        """Checks config, names and shapes; reads no weights.

        Raises:
            CheckpointError: not such a folder, not implemented, or tensors are missing, unexpected or misshapen.
        """
        self.folder = folder
        fields = _read_json(folder / "config.json")
        self.model_config: ModelConfig = config_from_json(fields, str(folder / "config.json"))
        assert self.model_config.context_length is not None, "every config.json that is read gives one"
        table = parameter_table(self.model_config, self.model_config.context_length)
        self._parameters = {parameter.name: parameter for parameter in table}
        self._files = _files_of_tensors(folder)
        self._open: dict[Path, Any] = {}
        self._last: tuple[str, list[Tensor]] = ("", [])
        tensors = hugging_face_tensors(fields["model_type"], self.model_config)
        self._names_in_files = self._match([t.name for t in tensors], base_prefix(fields["model_type"]))
        self._where = {name: (tensor, part) for tensor in tensors for part, name in enumerate(tensor.parts)}
        self._check_shapes(tensors)

    def names(self) -> list[str]:
        """Names of all parameters."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter in our model, the padding rows of the vocabulary included."""
        return self._parameters[name].shape

    def keys(self, name: str) -> tuple[str, ...]:
        """Weights only."""
        return (WEIGHTS,)

    def scalars(self, name: str) -> Mapping[str, float]:
        """None: the optimizer starts anew."""
        return {}

    def read(self, name: str, key: str, region: Region) -> Tensor:
        """The fp32 values of a region of the parameter, 1-d; padding rows are zeros."""
        assert key == WEIGHTS, f"a Hugging Face folder contains weights only, not {key}"
        tensor, part = self._where[name]
        if tensor.layout is not SAME:
            return region.of(self._parts(tensor)[part]).float()
        out = torch.zeros(len(region), dtype=torch.float32)
        real = whole(real_shape(self._parameters[name]))
        for common in overlaps(region, Region(real, 0, real.num_elements)):
            values = self._elements(tensor.name, common.stored_start, common.stored_stop)
            place = out.as_strided(common.shape, common.wanted_strides, common.wanted_start)
            # `values` may be part of a larger read: its own offset counts
            place.copy_(values.as_strided(common.shape, common.stored_strides))
        return out

    def read_whole(self, name: str) -> Tensor:
        """The fp32 weights of a parameter, in its shape."""
        shape = self.shape(name)
        return self.read(name, WEIGHTS, Region(whole(shape), 0, math.prod(shape))).view(shape)

    def _elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened tensor in the files; reads only the rows that contain them."""
        stored = self._slice(name)
        width = math.prod(stored.get_shape()[1:])
        first = start // width
        rows = stored[first : -(-stop // width)]
        return rows.reshape(-1)[start - first * width : stop - first * width]

    def _parts(self, tensor: HuggingFaceTensor) -> list[Tensor]:
        """Our parameters in one fused or transposed tensor. The last one is remembered: its parts are read in turn."""
        if self._last[0] != tensor.name:
            self._last = (tensor.name, list(tensor.layout.split(self._slice(tensor.name)[:])))
        return self._last[1]

    def _slice(self, name: str) -> Any:
        """A tensor in the files, opened so that ranges of it can be read alone."""
        name = self._names_in_files[name]
        return self._file(self._files[name]).get_slice(name)

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from error
        return self._open[path]

    def _match(self, expected: list[str], prefix: str) -> dict[str, str]:
        """The name in the files of each expected tensor; files of the bare model leave the prefix out."""
        names = {}
        for name in expected:
            short = name.removeprefix(prefix)
            names[name] = short if name not in self._files and short in self._files else name
        missing = [name for name in names.values() if name not in self._files]
        unexpected = [n for n in self._files if n not in names.values() and not n.endswith(IGNORED_SUFFIXES)]
        unexpected = [n for n in unexpected if not self._is_copy_of_embedding(n, names[expected[0]])]
        problems = [f"lacks {_some(missing)}"] if missing else []
        problems += [f"has {_some(unexpected)}, which the model has no place for"] if unexpected else []
        if problems:
            raise CheckpointError(f"{self.folder}: {'; '.join(problems)}")
        return names

    def _is_copy_of_embedding(self, name: str, embedding: str) -> bool:
        """Whether a tied model's head was saved although it equals the embedding. Other values mean that it is not tied."""
        if name not in ("lm_head.weight", "embed_out.weight") or embedding not in self._files:
            return False
        head, embed = (self._file(self._files[n]).get_tensor(n) for n in (name, embedding))
        return torch.equal(head, embed)

    def _check_shapes(self, tensors: list[HuggingFaceTensor]) -> None:
        """Compare every tensor's shape with the one that config.json gives it."""
        wrong = []
        for tensor in tensors:
            parts = [torch.empty(real_shape(self._parameters[name]), device="meta") for name in tensor.parts]
            found, wanted = list(self._slice(tensor.name).get_shape()), list(tensor.layout.join(parts).shape)
            if found != wanted:
                wrong.append(f"{tensor.name} is {found}, not {wanted}")
        if wrong:
            raise CheckpointError(f"{self.folder}: its tensors are not those of its config.json: {_some(wrong)}")


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """The file that contains each tensor."""
    if (folder / INDEX_FILE).is_file():
        return {name: folder / file for name, file in _read_json(folder / INDEX_FILE)["weight_map"].items()}
    path = folder / SINGLE_FILE
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                return dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
    pickled = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
    hint = f"; {pickled[0]} is a pickle, which is not loaded: convert it to safetensors first" if pickled else ""
    raise CheckpointError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return content


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
