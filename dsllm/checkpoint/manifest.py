"""The manifest of a checkpoint: which file holds which part of which parameter, and everything that is not a tensor."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import StringConstraints, TypeAdapter

from dsllm.checkpoint.geometry import covered_twice
from dsllm.checkpoint.seal import sealed
from dsllm.config.fields import FORBID_UNKNOWN_KEYS
from dsllm.config.migrate import ConfigVersion
from dsllm.errors import CheckpointError
from dsllm.files import write_atomically
from dsllm.slices import WEIGHTS, Box, Region, whole

FORMAT_VERSION = 3
"""3 ends with its own checksum, and keeps the tokenizer's hash. 2 is the same without these two."""
FORMAT_WITHOUT_CHECKSUM = 2
MANIFEST_FILE = "manifest.json"


What = Literal["weights", "all"]
"""Which files: those that hold weights, or those with the optimizer's state too."""

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A name without folders, so that a manifest cannot point out of its own folder."""

_RECORD = FORBID_UNKNOWN_KEYS | {"allow_inf_nan": False}


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One safetensors file."""

    __pydantic_config__ = _RECORD

    name: FileName
    """File name inside the checkpoint's folder."""
    num_bytes: int
    sha256: str
    renamed_keys: dict[str, str] = field(default_factory=dict)
    """Keys of tensors that the file calls differently, with its names for them. Empty in files of format 2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceRecord:
    """One region of one parameter."""

    __pydantic_config__ = _RECORD

    name: str
    """Global name of the parameter."""
    start: int
    """The region is the elements [start, stop) of the box, flattened in row-major order."""
    stop: int
    box: Box | None = None
    """None (default): the box is the whole parameter."""

    def region(self, shape: tuple[int, ...]) -> Region:
        """The region, for a parameter of this global shape."""
        return Region(self.box or whole(shape), self.start, self.stop)


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What one rank wrote: the weights of its slices, and in a file of their own the optimizer's tensors."""

    __pydantic_config__ = _RECORD

    weights: FileRecord | None
    """None: the rank had no slice."""
    optimizer: FileRecord | None
    """None: no slice of the rank has optimizer state."""
    slices: tuple[SliceRecord, ...]

    def file_of(self, key: str) -> FileRecord | None:
        """The file with the tensors of a key."""
        return self.weights if key == WEIGHTS else self.optimizer


@dataclass(frozen=True, kw_only=True)
class ParameterRecord:
    """One parameter of the model. Nothing here depends on the layout that wrote it."""

    __pydantic_config__ = _RECORD

    shape: tuple[int, ...]
    """Global shape."""
    keys: tuple[str, ...]
    """The tensors stored for every element: WEIGHTS first, then the optimizer's."""
    scalars: dict[str, float] = field(default_factory=dict)
    """The optimizer's numbers for the whole parameter."""
    expert: int | None = None
    """Global number of the expert it belongs to; None (default): it is not part of an expert."""
    trainable: bool = True
    """False: frozen, so it has weights only."""


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """What it takes to build the model, so that a checkpoint opens even where its run's config cannot be read."""

    __pydantic_config__ = _RECORD

    config: dict[str, Any]
    """The fields of ModelConfig, the vocabulary resolved."""
    context_length: int
    """Longest sequence it is made for, in tokens."""
    precision: str | None = None
    """The precision it was trained in, resolved; None (default): not known."""


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """Everything in a checkpoint except the tensors."""

    __pydantic_config__ = _RECORD

    format_version: int = FORMAT_VERSION
    progress: dict[str, Any]
    """How far the run had come: step, tokens, data position and fingerprint, skipped steps."""
    engine: dict[str, Any]
    """The layout that wrote it (ZeRO stage, precision, world size) and the state of the loss scale."""
    model: ModelRecord
    config: dict[str, Any]
    """The resolved run."""
    config_version: ConfigVersion
    """Version of the fields in `config` and `model.config`."""
    config_changed: tuple[str, ...] = ()
    """Fields that are not at their default: the ones an older dsllm must know in order to read the run."""
    deepspeed: dict[str, Any]
    """The final DeepSpeed config."""
    versions: dict[str, str]
    """Libraries that wrote it."""
    tokenizer_sha256: str | None = None
    """Hash of the tokenizer's folder (`dsllm.files.sha256_of_folder`); None (default): not known, as in formats 1 and 2."""
    parameters: dict[str, ParameterRecord]
    parts: tuple[PartRecord, ...]

    def files(self, what: What) -> list[FileRecord]:
        """The checkpoint's files, those with weights first, each of them once."""
        found = [part.weights for part in self.parts]
        if what == "all":
            found += [part.optimizer for part in self.parts]
        return list({file.name: file for file in found if file is not None}.values())


MANIFEST = TypeAdapter(CheckpointManifest)
"""Its content from and to JSON."""
_WITH_NUMBERS = ("progress", "engine", "model", "config", "deepspeed", "parameters")
"""Fields of the manifest that contain floating-point numbers."""


def tensor_name(name: str, region: Region, shape: tuple[int, ...], key: str) -> str:
    """Name of one slice's tensor inside a safetensors file: `NAME@START/KEY`, or `NAME@ROW,COLUMN:START/KEY`.

    START counts from the first element of the slice's box, whose corner is ROW,COLUMN; the corner is left out where the
    box is the whole parameter.
    """
    corner = "" if region.box == whole(shape) else ",".join(map(str, region.box.start)) + ":"
    return f"{name}@{corner}{region.start}/{key}"


def write_manifest(folder: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest; it is the last file of a checkpoint to appear.

    Raises:
        OSError: the disk refuses.
        CheckpointError: a number in it is not finite, which JSON cannot hold.
    """
    path = folder / MANIFEST_FILE
    names = ", ".join(_not_finite({name: getattr(manifest, name) for name in _WITH_NUMBERS}, ""))
    if names:  # pydantic would write null in their place
        raise CheckpointError(f"{path}: cannot be written: {names} must be finite numbers")
    write_atomically(path, sealed(MANIFEST.dump_json(manifest)))


def incomplete(manifest: CheckpointManifest) -> str:
    """Which parameters lack an element or have one twice; empty: the slices make a whole checkpoint."""
    regions: dict[str, list[Region]] = {name: [] for name in manifest.parameters}
    for part in manifest.parts:
        for piece in part.slices:
            regions[piece.name].append(piece.region(manifest.parameters[piece.name].shape))
    problems = []
    for name, found in regions.items():
        size, num_saved = math.prod(manifest.parameters[name].shape), sum(map(len, found))
        twice = covered_twice(found)
        if twice is not None:
            problems.append(f"{name}: elements of {twice[0]} are in {twice[1]} too")
        elif num_saved != size:
            problems.append(f"{name}: {num_saved} of its {size} elements are there")
    more = f"; and {len(problems) - 5} more parameters" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more


def _not_finite(content: Any, path: str) -> Iterator[str]:
    """The dotted names of all numbers that are NaN or infinite."""
    if isinstance(content, ModelRecord | ParameterRecord):
        content = vars(content)
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _not_finite(value, f"{path}.{key}".lstrip("."))
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            yield from _not_finite(value, f"{path}.{number}")
    elif isinstance(content, float) and not math.isfinite(content):
        yield path
