"""Reads a checkpoint: any region of any parameter, whichever layout wrote it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dsllm.checkpoint.geometry import covered_twice, overlaps
from dsllm.checkpoint.manifest import FileRecord, ParameterRecord, tensor_name
from dsllm.checkpoint.read_manifest import read_manifest
from dsllm.config.migrate import SavedConfig, read_model, read_run
from dsllm.config.model import ModelConfig
from dsllm.config.run import RunConfig
from dsllm.errors import CheckpointError
from dsllm.slices import WEIGHTS, Region, whole
from dsllm.untrusted_files import UntrustedFileError, check_regular

Piece = tuple[Region, FileRecord]
"""A stored region and the file that contains it."""


class CheckpointReader:
    """The state in one checkpoint's folder. Files are opened when first needed, and only the requested regions are read."""

    def __init__(self, folder: Path):
        """Raises CheckpointError where the manifest is missing, damaged or of a newer format (see `read_manifest`)."""
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._open: dict[str, Any] = {}
        self._parts_of: dict[str, list[tuple[Region, int]]] = {name: [] for name in self.manifest.parameters}
        for number, part in enumerate(self.manifest.parts):
            for piece in part.slices:
                self._parts_of[piece.name].append((piece.region(self.shape(piece.name)), number))
        self._checked: set[str] = set()

    def run(self) -> RunConfig:
        """The run that was saved.

        Raises:
            CheckpointError: its config needs a newer dsllm.
        """
        return read_run(self._saved(self.manifest.config))

    @property
    def model_config(self) -> ModelConfig:
        """The model that was saved, its vocabulary resolved; does not need the run's config.

        Raises:
            CheckpointError: its config needs a newer dsllm.
        """
        return read_model(self._saved({"model": self.manifest.model.config}))

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was saved."""
        return int(self.manifest.progress["step"])

    def names(self) -> list[str]:
        """Names of all parameters."""
        return list(self.manifest.parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a parameter."""
        return self.manifest.parameters[name].shape

    def keys(self, name: str) -> tuple[str, ...]:
        """The tensors stored for a parameter: WEIGHTS, and the optimizer's."""
        return self.manifest.parameters[name].keys

    def scalars(self, name: str) -> Mapping[str, float]:
        """The optimizer's numbers for a parameter."""
        return self.manifest.parameters[name].scalars

    def read(self, name: str, key: str, region: Region) -> torch.Tensor:
        """The fp32 values of a region of the parameter, 1-d.

        Raises:
            CheckpointError: there is no such parameter or tensor, or its pieces do not cover the region exactly once.
        """
        record = self._parameter(name, key)
        out = torch.empty(len(region), dtype=torch.float32)
        num_read = 0
        for stored, file in self._pieces(name, key):
            for common in overlaps(region, stored):
                stored_name = tensor_name(name, stored, record.shape, file.renamed_keys.get(key, key))
                tensor = self._tensor(file, stored_name, len(stored))
                values = tensor[common.stored_start : common.stored_stop]
                place = out.as_strided(common.shape, common.wanted_strides, common.wanted_start)
                place.copy_(values.as_strided(common.shape, common.stored_strides))
                num_read += common.num_elements
        if num_read != len(region):  # no element is stored twice, so some are missing
            raise CheckpointError(
                f"{self.folder}: contains {num_read} of the {len(region)} elements [{region.start}, {region.stop}) of "
                f"{name} ({key})"
            )
        return out

    def read_whole(self, name: str) -> torch.Tensor:
        """The fp32 weights of a parameter, in its global shape."""
        shape = self.shape(name)
        return self.read(name, WEIGHTS, Region(whole(shape), 0, math.prod(shape))).view(shape)

    def _parameter(self, name: str, key: str) -> ParameterRecord:
        record = self.manifest.parameters.get(name)
        if record is None:
            raise CheckpointError(f"{self.folder}: has no parameter {name}; the model was built from another config")
        if key not in record.keys:
            raise CheckpointError(f"{self.folder}: has no {key} of {name}, only {', '.join(record.keys)}")
        return record

    def _pieces(self, name: str, key: str) -> list[Piece]:
        """The stored regions of a parameter, each with its file. No two share an element."""
        found = self._parts_of[name]
        if name not in self._checked:
            twice = covered_twice([region for region, _ in found])
            if twice is not None:
                raise CheckpointError(f"{self.folder}: stores elements of {name} twice: {twice[0]} and {twice[1]}")
            self._checked.add(name)
        files = [(region, self.manifest.parts[number].file_of(key)) for region, number in found]
        return [(region, file) for region, file in files if file is not None]

    def _tensor(self, file: FileRecord, name: str, length: int) -> Any:
        """A tensor in a file, opened so that ranges of it can be read alone."""
        path = self.folder / file.name
        try:
            if file.name not in self._open:
                check_regular(path)
                self._open[file.name] = safe_open(path, framework="pt")
            tensor = self._open[file.name].get_slice(name)
        except (OSError, SafetensorError, UntrustedFileError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        found = (tensor.get_dtype(), tensor.get_shape())
        if found != ("F32", [length]):
            raise CheckpointError(f"{path}: {name} has type and shape {found}, the manifest says {length} fp32 numbers")
        return tensor

    def _saved(self, tree: Mapping[str, Any]) -> SavedConfig:
        manifest = self.manifest
        return SavedConfig(
            tree=tree, version=manifest.config_version, changed=manifest.config_changed, origin=str(self.folder)
        )
