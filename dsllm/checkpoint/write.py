"""Writes a checkpoint: each rank streams its slices into two safetensors files, rank 0 publishes the whole."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from dsllm.byte_units import GIB
from dsllm.checkpoint.find import checkpoint_name, new_folder, put_aside, remove_leftovers
from dsllm.checkpoint.manifest import (
    CheckpointManifest,
    FileRecord,
    ParameterRecord,
    PartRecord,
    SliceRecord,
    incomplete,
    tensor_name,
    write_manifest,
)
from dsllm.errors import CheckpointError
from dsllm.files import publish_directory
from dsllm.slices import WEIGHTS, ParameterSlice, whole

FP32_BYTES = 4


def start_checkpoint(directory: Path, step: int) -> Path:
    """Make the empty folder that `write_slices` fills, and remove what a killed attempt left behind. Rank 0."""
    remove_leftovers(directory)
    return new_folder(directory / f".{checkpoint_name(step)}", "partial")


def write_slices(
    aside: Path, rank: int, slices: Iterable[ParameterSlice]
) -> tuple[PartRecord, dict[str, ParameterRecord]]:
    """Stream this rank's slices into its files, without a second copy of them in memory.

    Returns what was written and what this rank knows about its parameters, both for the manifest.

    Raises:
        CheckpointError: a file cannot be written (disk full, no permission).
    """
    # Asynchronous writing joins here: copy the slices into pinned memory, return to training, and let a thread do the rest.
    slices = [piece for piece in slices if len(piece.region)]
    try:
        weights = _write_file(aside / f"weights-{rank:05d}.safetensors", slices, [WEIGHTS])
        state_keys = sorted({key for piece in slices for key in piece.tensors if key != WEIGHTS})
        optimizer = _write_file(aside / f"optimizer-{rank:05d}.safetensors", slices, state_keys)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or aside}: cannot be written: {error.strerror or error}; {_room(aside, slices)}"
        ) from error
    return PartRecord(weights=weights, optimizer=optimizer, slices=tuple(map(_slice_record, slices))), {
        piece.name: _parameter_record(piece) for piece in slices
    }


def publish_checkpoint(aside: Path, final: Path, manifest: CheckpointManifest) -> list[str]:
    """Write the manifest and rename the folder into place: from here on the checkpoint exists. Rank 0.

    Returns lines for the user about what was in the way.

    Raises:
        CheckpointError: the slices do not cover every parameter exactly once, or the disk refuses.
    """
    check_complete(manifest)
    warning = ""
    try:
        write_manifest(aside, manifest)
        if os.path.lexists(final):
            warning = put_aside(final)
        publish_directory(aside, final)
    except OSError as error:
        raise CheckpointError(f"{final}: cannot be published: {error.strerror or error}") from error
    if warning:
        return [warning]
    remove_leftovers(final.parent)  # a damaged checkpoint of the same step
    return []


def discard_checkpoint(aside: Path) -> None:
    """Remove what a failed save has left behind. Rank 0."""
    shutil.rmtree(aside, ignore_errors=True)


def merge_parameters(found: Sequence[dict[str, ParameterRecord]]) -> dict[str, ParameterRecord]:
    """Merge the records of all ranks into one table of parameters.

    Raises:
        CheckpointError: two ranks disagree about a parameter.
    """
    merged: dict[str, ParameterRecord] = {}
    for rank, table in enumerate(found):
        for name, record in table.items():
            if merged.setdefault(name, record) != record:
                raise CheckpointError(
                    f"{name}: rank {rank} would save it as {record}, an earlier rank as {merged[name]}"
                )
    return merged


def check_complete(manifest: CheckpointManifest) -> None:
    """Refuse a checkpoint that lacks an element of a parameter or has one twice.

    Raises:
        CheckpointError: names the parameters.
    """
    problems = incomplete(manifest)
    if problems:
        raise CheckpointError(f"the ranks' slices do not make a whole checkpoint: {problems}")


def _slice_record(piece: ParameterSlice) -> SliceRecord:
    region = piece.region
    box = None if region.box == whole(piece.shape) else region.box
    return SliceRecord(name=piece.name, start=region.start, stop=region.stop, box=box)


def _parameter_record(piece: ParameterSlice) -> ParameterRecord:
    return ParameterRecord(
        shape=tuple(piece.shape),
        keys=tuple(piece.tensors),
        scalars=dict(piece.scalars),
        expert=piece.expert,
        trainable=piece.trainable,
    )


def _room(aside: Path, slices: Sequence[ParameterSlice]) -> str:
    needed = sum(t.numel() * FP32_BYTES for s in slices for t in s.tensors.values())
    free = shutil.disk_usage(aside).free
    return f"this rank's state needs {needed / GIB:.3f} GiB, {free / GIB:.3f} GiB are free in {aside.parent}"


class _Hashed:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]):
        self.file, self.digest, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.num_bytes += len(data)


def _write_file(path: Path, slices: Sequence[ParameterSlice], keys: Sequence[str]) -> FileRecord | None:
    """The tensors of some keys as one file; None where the slices have none of them."""
    tensors = {
        tensor_name(piece.name, piece.region, piece.shape, key): piece.tensors[key]
        for piece in slices
        for key in keys
        if key in piece.tensors
    }
    if not tensors:
        return None
    try:
        num_bytes, digest = _write_safetensors(path, tensors)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    return FileRecord(name=path.name, num_bytes=num_bytes, sha256=digest)


def _write_safetensors(path: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    """The safetensors format, tensor by tensor: the library's own writer needs all of them in memory at once."""
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
            values = tensor.detach().float().cpu().contiguous()  # a view where it is one already
            out.write(values.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return out.num_bytes, out.digest.hexdigest()
