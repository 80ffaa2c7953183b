"""Reads a Hugging Face folder as if it were a checkpoint of ours: Llama, GPT-2 or GPT-NeoX, from safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsllm.checkpoint.hugging_face_config import config_from_json
from dsllm.checkpoint.hugging_face_names import IGNORED_SUFFIXES, SAME, TheirTensor, base_prefix, their_tensors
from dsllm.config.model import ModelConfig
from dsllm.errors import CheckpointError
from dsllm.slices import WEIGHTS, Region, whole

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
VOCABULARY = ("embed.weight", "head.weight")
"""Parameters with a row per token id: ours have padding rows, theirs have not."""


def is_hugging_face_folder(folder: Path) -> bool:
    """Whether a folder looks like one that `HuggingFaceReader` reads."""
    return (folder / "config.json").is_file()


class HuggingFaceReader:
    """The weights of a Hugging Face folder under our names. Files are opened when needed; what is asked for is read."""

    def __init__(self, folder: Path):
        """Checks config, names and shapes; reads no weights.

        Raises:
            CheckpointError: not such a folder, not implemented, or tensors are missing, unexpected or misshapen.
        """
        self.folder = folder
        fields = _read_json(folder / "config.json")
        self.model_config: ModelConfig = config_from_json(fields, str(folder / "config.json"))
        self._files = _files_of_tensors(folder)
        self._open: dict[Path, Any] = {}
        self._last: tuple[str, list[Tensor]] = ("", [])
        self._where: dict[str, tuple[TheirTensor, int]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        tensors = their_tensors(fields["model_type"], self.model_config)
        self._names = self._match([t.name for t in tensors], base_prefix(fields["model_type"]))
        for tensor in tensors:
            for part, name in enumerate(tensor.parts):
                self._where[name] = (tensor, part)
        self._find_shapes(tensors)

    def names(self) -> list[str]:
        """Names of all parameters."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter in our model, the padding rows of the vocabulary included."""
        return self._shapes[name]

    def keys(self, name: str) -> tuple[str, ...]:
        """Weights only."""
        return (WEIGHTS,)

    def scalars(self, name: str) -> Mapping[str, float]:
        """None: the optimizer starts anew."""
        return {}

    def read(self, name: str, key: str, region: Region) -> Tensor:
        """The fp32 values of a region of the parameter; padding rows are zeros."""
        assert key == WEIGHTS, f"a Hugging Face folder holds weights only, not {key}"
        assert region.box == whole(self.shape(name)), "parts of a parameter are not read yet"
        tensor, part = self._where[name]
        start, stop = region.start, region.stop
        out = torch.zeros(stop - start, dtype=torch.float32)
        if tensor.layout is SAME:
            values = self._rows(tensor.name, start, stop)
        else:
            values = self._parts(tensor)[part].reshape(-1)[start:stop]
        out[: len(values)] = values
        return out

    def read_whole(self, name: str) -> Tensor:
        """The fp32 weights of a parameter, in its shape."""
        shape = self.shape(name)
        return self.read(name, WEIGHTS, Region(whole(shape), 0, torch.Size(shape).numel())).view(shape)

    def _rows(self, their_name: str, start: int, stop: int) -> Tensor:
        """The values [start, stop) of a flattened tensor of theirs, fewer at its end; reads the rows that hold them."""
        piece = self._slice(their_name)
        num_rows, *row_shape = piece.get_shape()
        width = torch.Size(row_shape).numel()
        first, last = start // width, min(-(-stop // width), num_rows)
        if first >= last:
            return torch.empty(0)
        return piece[first:last].reshape(-1)[start - first * width : stop - first * width]

    def _parts(self, tensor: TheirTensor) -> list[Tensor]:
        """Our parameters in one tensor of theirs. The last one is remembered: its parts are read in turn."""
        if self._last[0] != tensor.name:
            self._last = (tensor.name, list(tensor.layout.split(self._slice(tensor.name)[:])))
        return self._last[1]

    def _slice(self, their_name: str) -> Any:
        name = self._names[their_name]
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
        """Whether a tied model's head was written all the same. Another matrix there would mean that it is not tied."""
        if name not in ("lm_head.weight", "embed_out.weight") or embedding not in self._files:
            return False
        head, embed = (self._file(self._files[n]).get_tensor(n) for n in (name, embedding))
        return torch.equal(head, embed)

    def _find_shapes(self, tensors: list[TheirTensor]) -> None:
        """The shape of each of our parameters, from those of their tensors."""
        config, wrong = self.model_config, []
        for tensor in tensors:
            theirs = self._slice(tensor.name).get_shape()
            parts = tensor.layout.split(torch.empty(theirs, device="meta"))
            for name, part in zip(tensor.parts, parts, strict=True):
                self._shapes[name] = tuple(part.shape)
            if tensor.parts[0] in VOCABULARY:
                if theirs != [config.vocab_size, config.hidden_size]:
                    wrong.append(f"{tensor.name} is {theirs}, not {[config.vocab_size, config.hidden_size]}")
                self._shapes[tensor.parts[0]] = (config.padded_vocab_size, config.hidden_size)
        if wrong:
            raise CheckpointError(f"{self.folder}: its tensors are not those of its config.json: {'; '.join(wrong)}")


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
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
