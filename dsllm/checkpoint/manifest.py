"""The manifest of a checkpoint: which file holds which range of which parameter, and all that is not a tensor."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsllm.errors import CheckpointError
from dsllm.files import write_atomically

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of slices."""

    name: str
    """File name inside the checkpoint's folder."""
    num_bytes: int
    sha256: str
    slices: list[tuple[str, int, int]]
    """(parameter, start, stop) of each slice in the file."""


@dataclass(frozen=True, kw_only=True)
class ParameterRecord:
    """One parameter of the model."""

    shape: tuple[int, ...]
    keys: tuple[str, ...]
    """Tensors kept of it: the master weights first, then the optimizer's moments."""
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """Everything about a checkpoint but its tensors."""

    format_version: int = FORMAT_VERSION
    progress: dict[str, Any]
    """Where the run stood: step, tokens, data position and fingerprint, skipped steps."""
    engine: dict[str, Any]
    """The layout that wrote it (ZeRO stage, precision, world size) and the state of the loss scale."""
    config: dict[str, Any]
    """The resolved run."""
    deepspeed: dict[str, Any]
    """The final DeepSpeed config."""
    versions: dict[str, str]
    """Libraries that wrote it."""
    parameters: dict[str, ParameterRecord]
    files: list[FileRecord]


def write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest; it is the last file of a checkpoint to appear."""
    write_atomically(folder / MANIFEST_FILE, json.dumps(asdict(manifest)))


def read_manifest(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint's folder.

    Raises:
        CheckpointError: missing, damaged, or of another format version.
    """
    path = folder / MANIFEST_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is not a readable checkpoint manifest: {error!r}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: has format version {version}; this dsllm reads version {FORMAT_VERSION}")
    try:
        parameters = {
            name: ParameterRecord(shape=tuple(p["shape"]), keys=tuple(p["keys"]), scalars=p["scalars"])
            for name, p in raw.pop("parameters").items()
        }
        files = [
            FileRecord(**{**f, "slices": [(name, start, stop) for name, start, stop in f["slices"]]})
            for f in raw.pop("files")
        ]
        return CheckpointManifest(**raw, parameters=parameters, files=files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: is not a checkpoint manifest of version {version}: {error!r}") from error
