"""Writes a checkpoint: each rank streams its slices into one safetensors file, rank 0 publishes the whole."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

from dsllm.byte_units import GIB
from dsllm.checkpoint.manifest import CheckpointManifest, FileRecord, ParameterRecord, write_manifest
from dsllm.errors import CheckpointError
from dsllm.files import publish_directory
from dsllm.slices import ParameterSlice

FP32_BYTES = 4


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps; sorts by step."""
    return f"step-{step:08d}"


def folder_aside(directory: Path, step: int) -> Path:
    """Folder in which the checkpoint is written before it is published."""
    return directory / f".{checkpoint_name(step)}.partial"


def tensor_key(name: str, start: int, key: str) -> str:
    """Name of one slice's tensor inside a safetensors file."""
    return f"{name}@{start}/{key}"


def start_checkpoint(directory: Path, step: int) -> Path:
    """Make the empty folder that `write_slices` fills; leftovers of an attempt that was killed are removed. Rank 0."""
    aside = folder_aside(directory, step)
    for leftover in directory.glob(".step-*.partial"):
        shutil.rmtree(leftover)
    aside.mkdir(parents=True)
    return aside


def write_slices(
    aside: Path, rank: int, slices: Iterable[ParameterSlice]
) -> tuple[FileRecord, dict[str, ParameterRecord]]:
    """Stream this rank's slices into one safetensors file, without a second copy of them in memory.

    Returns the file's record and what this rank knows of its parameters, both for the manifest.

    Raises:
        CheckpointError: the file cannot be written (disk full, no permission).
    """
    slices = list(slices)
    path = aside / f"slices-{rank:05d}.safetensors"
    try:
        num_bytes, digest = _write_safetensors(path, slices)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror or error}; {_room(aside, slices)}"
        ) from error
    record = FileRecord(
        name=path.name,
        num_bytes=num_bytes,
        sha256=digest,
        slices=[(s.name, s.region.start, s.region.stop) for s in slices],
    )
    return record, {
        s.name: ParameterRecord(shape=s.shape, keys=tuple(s.tensors), scalars=dict(s.scalars)) for s in slices
    }


def publish_checkpoint(aside: Path, final: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest and rename the folder into place: from here on the checkpoint exists. Rank 0.

    Raises:
        CheckpointError: the disk refuses.
    """
    try:
        write_manifest(aside, manifest)
        if final.exists():  # a damaged checkpoint of the same step, or one of a run that was started over
            shutil.rmtree(final)
        publish_directory(aside, final)
    except OSError as error:
        raise CheckpointError(f"{final}: cannot be published: {error.strerror or error}") from error


def discard_checkpoint(aside: Path) -> None:
    """Remove what a failed save has left behind. Rank 0."""
    shutil.rmtree(aside, ignore_errors=True)


def merge_parameters(found: Sequence[dict[str, ParameterRecord]]) -> dict[str, ParameterRecord]:
    """What all ranks know of the parameters, as one table."""
    return {name: record for table in found for name, record in table.items()}


def _room(aside: Path, slices: Sequence[ParameterSlice]) -> str:
    needed = sum(t.numel() * FP32_BYTES for s in slices for t in s.tensors.values())
    free = shutil.disk_usage(aside).free
    return f"this rank's state needs {needed / GIB:.3f} GiB, {free / GIB:.3f} GiB are free in {aside.parent}"


class _Hashed:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]):
        self.file, self.digest, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.num_bytes += len(data)


def _write_safetensors(path: Path, slices: Sequence[ParameterSlice]) -> tuple[int, str]:
    """The safetensors format, tensor by tensor: the library's own writer wants all of them in memory, unshared."""
    tensors = {tensor_key(s.name, s.region.start, key): tensor for s in slices for key, tensor in s.tensors.items()}
    header: dict[str, dict[str, object]] = {}
    at = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * FP32_BYTES
        header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the format wants the tensors aligned
    with open(path, "wb") as file:
        out = _Hashed(file)
        out.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            out.write(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
    return out.num_bytes, out.digest.hexdigest()
