"""Reads a Hugging Face folder like a checkpoint: Llama, Mistral, Qwen2, GPT-2 or GPT-NeoX, from safetensors."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dsllm.checkpoint.geometry import overlaps
from dsllm.checkpoint.hugging_face_files import check_size, files_of_tensors, open_safetensors, read_architecture
from dsllm.checkpoint.hugging_face_names import (
    IGNORED_SUFFIXES,
    OTHER_NAMES,
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

_READABLE = ("F64", "F32", "F16", "BF16")
"""Element types that can be read; integers and 8 bits are those of quantized weights."""


class HuggingFaceReader:
    """The weights in a Hugging Face folder, under the names of dsllm. Reads only the regions that are requested."""

    def __init__(self, folder: Path):
        """Checks config, names and shapes; reads no weights.

        Raises:
            CheckpointError: not such a folder, not implemented, or tensors are missing, unexpected or misshapen.
        """
        self.folder = folder
        self.model_config: ModelConfig
        fields, self.model_config = read_architecture(folder)
        assert self.model_config.context_length is not None, "every config.json that is read gives one"
        self._files = files_of_tensors(folder)
        self._open: dict[Path, Any] = {}
        check_size(folder, self.model_config, self._files)
        table = parameter_table(self.model_config, self.model_config.context_length)
        self._parameters = {parameter.name: parameter for parameter in table}
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
        name = self._names_in_files[name]
        width = math.prod(self._stored(name).get_shape()[1:])
        first = start // width
        rows = self._rows(name, slice(first, -(-stop // width)))
        return rows.reshape(-1)[start - first * width : stop - first * width]

    def _parts(self, tensor: HuggingFaceTensor) -> list[Tensor]:
        """Our parameters in one fused or transposed tensor. The last one is remembered: its parts are read in turn."""
        if self._last[0] != tensor.name:
            self._last = (tensor.name, list(tensor.layout.split(self._rows(self._names_in_files[tensor.name]))))
        return self._last[1]

    def _rows(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of a tensor, under its name in the files."""
        try:
            values: Tensor = self._stored(name)[rows]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._files[name]}: {name} cannot be read: {error}") from error
        return values

    def _stored(self, name: str) -> Any:
        """A tensor under its name in the files, opened so that ranges of it can be read alone."""
        path = self._files[name]
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        try:
            return self._open[path].get_slice(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error

    def _match(self, expected: list[str], prefix: str) -> dict[str, str]:
        """The name in the files of each expected tensor. Files of the bare model leave the prefix out."""
        names = {}
        for name in expected:
            others = (name, name.removeprefix(prefix), OTHER_NAMES.get(name, name))
            names[name] = next((other for other in others if other in self._files), name)
        missing = [name for name in names.values() if name not in self._files]
        known = set(names.values())
        unexpected = [n for n in self._files if n not in known and not n.endswith(IGNORED_SUFFIXES)]
        unexpected = [n for n in unexpected if not self._is_copy_of_embedding(n, names[expected[0]])]
        problems = [f"lacks {_some(missing)}"] if missing else []
        problems += [f"has {_some(unexpected)}, which the model has no place for"] if unexpected else []
        if problems:
            raise CheckpointError(f"{self.folder}: {'; '.join(problems)}")
        return names

    def _is_copy_of_embedding(self, name: str, embedding: str) -> bool:
        """Whether a tied model's head was saved although it equals the embedding.

        Raises:
            CheckpointError: it has other values, so it is not tied.
        """
        heads = ("lm_head.weight", "embed_out.weight")
        if not self.model_config.tie_embeddings or name not in heads or embedding not in self._files:
            return False
        head, embed = self._rows(name).float(), self._rows(embedding).float()
        if not torch.equal(head, embed):
            raise CheckpointError(
                f"{self.folder}: {name} differs from {embedding}, but config.json says that they are tied: "
                'set "tie_word_embeddings": false in it to use both'
            )
        return True

    def _check_shapes(self, tensors: list[HuggingFaceTensor]) -> None:
        """Compare every tensor's type with those that can be read, and its shape with the one that config.json gives it."""
        types = {tensor.name: self._stored(self._names_in_files[tensor.name]).get_dtype() for tensor in tensors}
        unreadable = [f"{name} is {kind}" for name, kind in types.items() if kind not in _READABLE]
        if unreadable:
            raise CheckpointError(
                f"{self.folder}: its weights are quantized or of a type that is not implemented: {_some(unreadable)}; "
                f"implemented: {', '.join(_READABLE)}"
            )
        wrong = []
        for tensor in tensors:
            parts = [torch.empty(real_shape(self._parameters[name]), device="meta") for name in tensor.parts]
            found = list(self._stored(self._names_in_files[tensor.name]).get_shape())
            wanted = list(tensor.layout.join(parts).shape)
            if found != wanted:
                wrong.append(f"{tensor.name} is {found}, not {wanted}")
        if wrong:
            raise CheckpointError(f"{self.folder}: its tensors are not those of its config.json: {_some(wrong)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(name if len(name) <= 80 else f"{name[:77]}..." for name in map(_printable, names[:5])) + more


def _printable(name: str) -> str:
    """A name from a file, with what a terminal would act on written out."""
    return name if name.isprintable() else repr(name)
