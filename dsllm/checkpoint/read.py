"""Reads a checkpoint: any range of any parameter, whichever layout wrote it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dsllm.checkpoint.manifest import FileRecord, read_manifest
from dsllm.checkpoint.write import tensor_key
from dsllm.errors import CheckpointError
from dsllm.slices import WEIGHTS, Region, whole


class CheckpointReader:
    """The state in one checkpoint's folder. Files are opened when first needed and only the asked ranges are read."""

    def __init__(self, folder: Path):
        """Raises CheckpointError where the manifest is missing or damaged."""
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._open: dict[str, Any] = {}
        self._pieces: dict[str, list[tuple[int, int, str]]] = {}
        for file in self.manifest.files:
            for name, start, stop in file.slices:
                self._pieces.setdefault(name, []).append((start, stop, file.name))

    @property
    def config(self) -> dict[str, Any]:
        """The resolved run that was saved."""
        return self.manifest.config

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
        """What is kept of a parameter: WEIGHTS, and the optimizer's moments."""
        return self.manifest.parameters[name].keys

    def scalars(self, name: str) -> Mapping[str, float]:
        """The optimizer's numbers for the parameter."""
        return self.manifest.parameters[name].scalars

    def read(self, name: str, key: str, region: Region) -> torch.Tensor:
        """The fp32 values of a region of the parameter.

        Raises:
            CheckpointError: no such parameter, or its pieces do not cover the range.
        """
        if name not in self.manifest.parameters:
            raise CheckpointError(f"{self.folder}: has no parameter {name}; the model was built from another config")
        assert region.box == whole(self.shape(name)), "parts of a parameter are not read yet"
        start, stop = region.start, region.stop
        out = torch.empty(stop - start, dtype=torch.float32)
        covered = 0
        for first, last, file in self._pieces[name]:
            low, high = max(first, start), min(last, stop)
            if low < high:
                piece = self._file(file).get_slice(tensor_key(name, first, key))
                out[low - start : high - start] = piece[low - first : high - first]
                covered += high - low
        if covered != stop - start:
            raise CheckpointError(
                f"{self.folder}: holds {covered} of the {stop - start} elements [{start}, {stop}) of {name} ({key})"
            )
        return out

    def read_whole(self, name: str) -> torch.Tensor:
        """The fp32 master weights of a parameter, in its global shape."""
        shape = self.shape(name)
        return self.read(name, WEIGHTS, Region(whole(shape), 0, torch.Size(shape).numel())).view(shape)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.folder / name}: cannot be read: {error}") from error
        return self._open[name]


def damage_in(folder: Path, rank: int = 0, num_ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, by size and SHA-256; None if nothing.

    The files are shared out: each of `num_ranks` ranks reads its part, and the caller joins the answers.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return str(error)
    answers = (_damage_in_file(folder, file) for file in manifest.files[rank::num_ranks])
    return next((answer for answer in answers if answer), None)


def _damage_in_file(folder: Path, record: FileRecord) -> str | None:
    path = folder / record.name
    try:
        size = path.stat().st_size
        if size != record.num_bytes:
            return f"{path}: has {size} bytes, the manifest says {record.num_bytes}"
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror or error}"
    return (
        None if digest == record.sha256 else f"{path}: its SHA-256 is not the one in the manifest: the file is damaged"
    )
