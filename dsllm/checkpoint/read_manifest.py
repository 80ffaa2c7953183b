"""Reads the manifest of a checkpoint that may be damaged, of another version, or from somebody else."""

import errno
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsllm.checkpoint import format_1
from dsllm.checkpoint.manifest import (
    FORMAT_VERSION,
    FORMAT_WITHOUT_CHECKSUM,
    MANIFEST,
    MANIFEST_FILE,
    CheckpointManifest,
    FileRecord,
    ParameterRecord,
    SliceRecord,
    incomplete,
)
from dsllm.checkpoint.seal import Seal, seal_of
from dsllm.config.fields import UNKNOWN_KEY
from dsllm.config.migrate import SavedConfig, read_model
from dsllm.config.model import ModelConfig
from dsllm.errors import CheckpointError
from dsllm.parameters import parameter_table
from dsllm.slices import WEIGHTS
from dsllm.untrusted_files import UntrustedFileError, parse_json, read_bounded

MOST_BYTES = 2**30
"""Largest manifest that is read. 1,000 parameters cut over 1,000 ranks take about 100 MB."""

_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)
"""Errors that mean a missing or unreadable file, wherever it is read from."""


class UnavailableCheckpointError(CheckpointError):
    """A checkpoint that may well be sound, but that this process cannot read: of a newer dsllm, or without permission.

    Its steps would be lost if an older checkpoint were used instead, so the user decides.
    """


def read_manifest(folder: Path) -> CheckpointManifest:
    """The manifest in a checkpoint's folder; one of format 1 or 2 is converted.

    Raises:
        CheckpointError: missing or damaged, so an older checkpoint can take its place.
        UnavailableCheckpointError: of a format that this version does not read, or not readable by this user.
    """
    path = folder / MANIFEST_FILE
    try:
        content = read_bounded(path, MOST_BYTES)
        raw = parse_json(content)
    except OSError as error:
        raise unreadable(path, error) from error
    except UntrustedFileError as error:
        raise CheckpointError(f"{path}: is not a readable checkpoint manifest: {error}") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if type(version) is not int:
        raise CheckpointError(f"{path}: is not a readable checkpoint manifest: it has no format version")
    seal = seal_of(content)
    _check_version(path, raw, version, seal)
    raw.pop("sha256", None)
    manifest = _validated(path, raw, version, seal)
    _check_counters(path, manifest)
    _check_parts(path, manifest)
    _check_parameters(path, manifest)
    if seal == "absent":
        _check_without_checksum(path, manifest)
    return manifest


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file of a checkpoint that cannot be read: is it damaged, or is it this process's fault?"""
    reason = f"{path}: cannot be read: {error.strerror or error}"
    if error.errno in _DAMAGE:
        return CheckpointError(reason)
    return UnavailableCheckpointError(
        f"{reason}. The checkpoint may well be sound: make it readable, or move it away to use an older one"
    )


def _check_version(path: Path, raw: dict[str, Any], version: int, seal: Seal) -> None:
    """Compare the checksum, and refuse formats that this version does not read.

    A newer format without a sound checksum is taken for damage: every format after 2 ends with one.
    """
    known = (format_1.FORMAT_VERSION, FORMAT_WITHOUT_CHECKSUM, FORMAT_VERSION)
    newer = (
        f"has format version {version}; this dsllm reads versions 1 to {FORMAT_VERSION}: update dsllm, or use the one "
        f"that wrote it{_writer(raw)}"
    )
    if version not in known:
        if seal == "sound":
            raise UnavailableCheckpointError(f"{path}: {newer}")
        raise CheckpointError(f"{path}: is damaged (its checksum is {seal}), or {newer}")
    if seal == "broken":
        raise CheckpointError(f"{path}: is damaged: its content does not match the checksum at its end")
    if version == FORMAT_VERSION and seal == "absent":
        raise CheckpointError(f"{path}: is damaged: the checksum at its end is missing")


def _validated(path: Path, raw: dict[str, Any], version: int, seal: Seal) -> CheckpointManifest:
    try:
        return MANIFEST.validate_python(format_1.converted(raw) if version == format_1.FORMAT_VERSION else raw)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        unknown = [".".join(map(str, item["loc"])) for item in problems if item["type"] in UNKNOWN_KEY]
        if unknown and seal == "sound":
            raise UnavailableCheckpointError(
                f"{path}: contains {', '.join(unknown[:3])}, which this dsllm does not know: update dsllm, or use the one "
                f"that wrote it{_writer(raw)}"
            ) from error
        where = ".".join(map(str, problems[0]["loc"]))
        reason = f"{where}: {problems[0]['msg']}" + (f" (and {len(problems) - 1} more)" if problems[1:] else "")
        raise CheckpointError(f"{path}: is not a checkpoint manifest of version {version}: {reason}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: is not a checkpoint manifest of version {version}: {error!r}") from error


def _check_counters(path: Path, manifest: CheckpointManifest) -> None:
    """Check the numbers that every reader relies on.

    Raises:
        CheckpointError: names the first that is wrong.
    """
    if manifest.model.context_length < 1:
        raise CheckpointError(
            f"{path}: is not a checkpoint manifest: a context of {manifest.model.context_length} tokens"
        )
    step, scaler = manifest.progress.get("step"), manifest.engine.get("loss_scaler")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{path}: is not a checkpoint manifest: progress.step is {step!r}")
    if not isinstance(scaler, dict) or not all(isinstance(value, int | float) for value in scaler.values()):
        raise CheckpointError(f"{path}: is not a checkpoint manifest: engine.loss_scaler is {scaler!r}")


def _check_parameters(path: Path, manifest: CheckpointManifest) -> None:
    """Check that every parameter has weights, and that the files are large enough for the shapes.

    Before anybody allocates memory for these shapes.

    Raises:
        CheckpointError: names the first problem.
    """
    for name, record in manifest.parameters.items():
        if record.keys[:1] != (WEIGHTS,):
            raise CheckpointError(f"{path}: is not a checkpoint manifest: {name} has {record.keys} and no weights")
        if any(size < 0 for size in record.shape):
            raise CheckpointError(f"{path}: is not a checkpoint manifest: {name} has the shape {record.shape}")
    needed = 4 * sum(math.prod(record.shape) for record in manifest.parameters.values())
    there = sum(file.num_bytes for file in manifest.files("weights"))
    if needed > there:
        raise CheckpointError(f"{path}: its parameters take {needed:,} bytes, but its files of weights have {there:,}")


def _check_parts(path: Path, manifest: CheckpointManifest) -> None:
    """Check that every slice is inside its parameter and has its files, of which each has one record.

    Raises:
        CheckpointError: names the first problem.
    """
    records: dict[str, FileRecord] = {}
    for number, part in enumerate(manifest.parts):
        for piece in part.slices:
            if not _fits(piece, manifest.parameters):
                raise CheckpointError(f"{path}: {piece} is not a part of any of its parameters")
        with_state = any(len(manifest.parameters[piece.name].keys) > 1 for piece in part.slices)
        if (part.slices and part.weights is None) or (with_state and part.optimizer is None):
            raise CheckpointError(f"{path}: is not a checkpoint manifest: part {number} has slices without their files")
        for file in (part.weights, part.optimizer):
            if file is not None and records.setdefault(file.name, file) != file:
                raise CheckpointError(f"{path}: is not a checkpoint manifest: it has two records of {file.name}")


def _check_without_checksum(path: Path, manifest: CheckpointManifest) -> None:
    """What can be checked of a manifest of format 1 or 2: its parameters are those of its model, and complete.

    Raises:
        CheckpointError: names the first problem.
    """
    tree = {"model": manifest.model.config}
    config = read_model(
        SavedConfig(tree=tree, version=manifest.config_version, changed=manifest.config_changed, origin=str(path))
    )
    found = {name: record.shape for name, record in manifest.parameters.items()}
    problem = not_the_parameters_of(config, manifest.model.context_length, found) or incomplete(manifest)
    records = list(manifest.parameters.values())
    if not problem and any((other.keys, other.scalars) != (records[0].keys, records[0].scalars) for other in records):
        problem = (
            "its parameters differ in their optimizer state, which AdamW, the only optimizer of that time, never does"
        )
    if problem:
        raise CheckpointError(f"{path}: is damaged: {problem}")


def not_the_parameters_of(config: ModelConfig, context_length: int, found: Mapping[str, Sequence[int]]) -> str:
    """How a model's parameters differ from those of its config; empty: they are the same. Builds no model.

    Args:
        found: global shape by name
    """
    # a damaged number of layers may be so large that listing their parameters does not end
    if config.vocab_size is None or config.num_layers > len(found):
        return f"a config of {config.num_layers:,} layers and a vocabulary of {config.vocab_size} has other parameters"
    wanted = {row.name: tuple(row.shape) for row in parameter_table(config, context_length)}
    wrong = [name for name in sorted({*wanted, *found}) if wanted.get(name) != tuple(found.get(name, (-1,)))]
    if not wrong:
        return ""
    first = wrong[0]
    return (
        f"{len(wrong)} parameters are not those of its config; the first, {first}, is "
        f"{tuple(found[first]) if first in found else 'absent'} there and {wanted.get(first, 'absent')} in the config"
    )


def _fits(piece: SliceRecord, parameters: Mapping[str, ParameterRecord]) -> bool:
    """Whether a slice is a region, not empty, of one of the parameters."""
    if piece.name not in parameters:
        return False
    shape = parameters[piece.name].shape
    region = piece.region(shape)
    corners = (region.box.start, region.box.stop, shape)
    return (
        all(len(corner) == len(shape) for corner in corners)
        and all(0 <= start < stop <= size for start, stop, size in zip(*corners, strict=True))
        and 0 <= region.start < region.stop <= region.box.num_elements
    )


def _writer(raw: dict[str, Any]) -> str:
    versions = raw.get("versions")
    known = versions.get("dsllm") if isinstance(versions, dict) else None
    return f" (dsllm {known})" if known else ""
