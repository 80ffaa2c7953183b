"""Opens a trained model from disk without DeepSpeed or process groups: a run, a checkpoint or a Hugging Face folder."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from dsllm.checkpoint.find import find_checkpoint, list_checkpoints
from dsllm.checkpoint.hugging_face import HuggingFaceReader
from dsllm.checkpoint.hugging_face_files import is_hugging_face_folder
from dsllm.checkpoint.read import CheckpointReader
from dsllm.checkpoint.read_manifest import not_the_parameters_of
from dsllm.config.model import ModelConfig
from dsllm.config.run import RunConfig
from dsllm.config.train import PRECISIONS, Precision
from dsllm.data.manifest import load_manifest
from dsllm.engine.processes.device import compute_dtype, parameter_dtype
from dsllm.errors import CheckpointError, DataError
from dsllm.model.transformer import Transformer
from dsllm.run_directory import CHECKPOINTS

_Value = TypeVar("_Value", str, int, bool)


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A model on disk, and what is known about it."""

    folder: Path
    """The checkpoint's folder, or the Hugging Face folder."""
    reader: CheckpointReader | HuggingFaceReader
    config: ModelConfig
    """Its shape, the vocabulary resolved."""
    context_length: int
    """Longest sequence it is made for, in tokens."""
    run: RunConfig | None = None
    """The run that trained it; None (default): it comes from a Hugging Face folder, or needs a newer dsllm."""
    step: int | None = None
    """Optimizer steps it was trained for; None (default): not known."""
    precision: Precision | None = None
    """The precision it was trained in; None (default): not known."""
    data_directory: Path | None = None
    """The prepared data it was trained on; None (default): not known."""
    sequence_length: int | None = None
    """Tokens per sequence in training; None (default): not known."""
    tokenizer_sha256: str | None = None
    """Hash of the folder of its tokenizer; None (default): not known."""
    document_mask: bool = False
    """Whether tokens attended to their own document only."""

    @property
    def is_hugging_face(self) -> bool:
        """Whether it comes from a Hugging Face folder."""
        return isinstance(self.reader, HuggingFaceReader)

    @property
    def run_directory(self) -> Path | None:
        """The run directory that the checkpoint is in; None: it is not in one."""
        return self.folder.parent.parent if self.folder.parent.name == CHECKPOINTS else None


def open_saved(path: Path, report: Callable[[str], None]) -> SavedModel:
    """The model that a path means: a run directory (its newest sound checkpoint), a checkpoint, or a Hugging Face folder.

    Of a checkpoint only the weights are verified and read, 4 bytes per parameter.

    Raises:
        CheckpointError: it is none of these, or it cannot be used.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder{_those_there(path)}")
    if _is_prepared_data(path):
        raise CheckpointError(f"{path}: is prepared data, not a model: give a run directory, a checkpoint or an export")
    if is_hugging_face_folder(path):
        reader = HuggingFaceReader(path)
        config = reader.model_config
        assert config.context_length is not None, "every config.json that is read gives one"
        return SavedModel(folder=path, reader=reader, config=config, context_length=config.context_length)
    checkpoint = CheckpointReader(find_checkpoint(path, report))
    manifest, config = checkpoint.manifest, checkpoint.model_config
    _check_parameters(checkpoint, config, manifest.model.context_length)
    data = manifest.config.get("data")
    directory = _value(data, "directory", str)
    return SavedModel(
        folder=checkpoint.folder,
        reader=checkpoint,
        config=config,
        context_length=manifest.model.context_length,
        run=_run(checkpoint, report),
        step=checkpoint.step,
        precision=next((known for known in PRECISIONS if known == manifest.model.precision), None),
        data_directory=Path(directory) if directory else None,
        tokenizer_sha256=manifest.tokenizer_sha256,
        sequence_length=_value(data, "sequence_length", int),
        document_mask=_value(data, "document_mask", bool) or False,
    )


def _those_there(path: Path) -> str:
    """The checkpoints next to one that is missing, to choose from."""
    try:
        there = list_checkpoints(path.parent) if path.name.startswith("step-") else []
    except OSError:
        return ""
    names = ", ".join(folder.name for folder in there[:10])
    return f"; there are {names} (older ones are removed by checkpoint.keep_last)" if names else ""


def _is_prepared_data(path: Path) -> bool:
    try:
        load_manifest(path)
    except DataError:
        return False
    return True


def _run(checkpoint: CheckpointReader, report: Callable[[str], None]) -> RunConfig | None:
    """The run of a checkpoint. The model opens without it, so a config that cannot be read is only reported."""
    try:
        return checkpoint.run()
    except CheckpointError as error:
        report(f"{error}\nThe model is opened without it")
        return None


def _value(section: Any, name: str, kind: type[_Value]) -> _Value | None:
    """A field of a saved section, whatever its other fields are; None: it is missing or of another type."""
    value = section.get(name) if isinstance(section, Mapping) else None
    return value if type(value) is kind else None


def load_model(saved: SavedModel, precision: Precision, device: torch.device) -> Transformer:
    """Build a saved model for inference; takes the memory of the model and of one fp32 parameter.

    Raises:
        CheckpointError: the saved parameters are not those of its config.
    """
    # before memory is allocated for whatever the config says
    _check_parameters(saved.reader, saved.config, saved.context_length)
    config = dataclasses.replace(saved.config, dropout=0.0)
    default_dtype = torch.get_default_dtype()
    # the parameters are created in their dtype: converting them later would break the tie of embedding and head
    torch.set_default_dtype(parameter_dtype(precision))
    try:
        with device:
            model = Transformer(config, saved.context_length, compute_dtype(precision))
    finally:
        torch.set_default_dtype(default_dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved.reader.read_whole(name))
    return model.eval()


def check_finite(saved: SavedModel, model: Transformer) -> None:
    """Refuse weights from which no number can follow.

    Raises:
        CheckpointError: a parameter contains NaN or infinity; names the first.
    """
    bad = [name for name, parameter in model.named_parameters() if not bool(torch.isfinite(parameter).all())]
    if bad:
        more = f" and {len(bad) - 1} more parameters" if len(bad) > 1 else ""
        dtype = next(model.parameters()).dtype
        raise CheckpointError(
            f"{saved.folder}: its weights are not finite in {dtype}: {bad[0]}{more} contain NaN or infinity: "
            "use an older checkpoint, or another --precision if they were finite when they were saved"
        )


def _check_parameters(reader: CheckpointReader | HuggingFaceReader, config: ModelConfig, context_length: int) -> None:
    """Refuse a model whose config is that of another one. Builds no model.

    Raises:
        CheckpointError: names the first parameter that differs.
    """
    found = {name: tuple(reader.shape(name)) for name in reader.names()}
    problem = not_the_parameters_of(config, context_length, found)
    if problem:
        raise CheckpointError(f"{reader.folder}: {problem}")
