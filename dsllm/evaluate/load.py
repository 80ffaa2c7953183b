"""Opens a trained model from disk without DeepSpeed or process groups: a run, a checkpoint or a Hugging Face folder."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from dsllm.checkpoint.find import find_checkpoint
from dsllm.checkpoint.hugging_face import HuggingFaceReader
from dsllm.checkpoint.hugging_face_files import is_hugging_face_folder
from dsllm.checkpoint.read import CheckpointReader
from dsllm.checkpoint.read_manifest import not_the_parameters_of
from dsllm.config.model import ModelConfig
from dsllm.config.run import RunConfig
from dsllm.config.train import PRECISIONS, Precision
from dsllm.data.manifest import FILE_NAME as DATA_MANIFEST
from dsllm.data.manifest import check_tokenizer, load_manifest
from dsllm.data.tokenizer import Tokenizer, load_tokenizer
from dsllm.data.tokenizer_folder import check_same
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
        raise CheckpointError(f"{path}: no such folder")
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


def find_tokenizer(saved: SavedModel, data: Path | None = None) -> Path:
    """Folder of the tokenizer that a model was trained with.

    That of the prepared data, if given; otherwise the one in the Hugging Face folder, in the run directory, or in the data
    that the run was trained on.

    Raises:
        DataError: there is none, or it is not the one that the model was trained with.
    """
    if data is None and saved.is_hugging_face:
        return saved.folder
    in_run = saved.run_directory / "tokenizer" if saved.run_directory else None
    if data is None and in_run is not None and in_run.is_dir():
        check_same(in_run, saved.tokenizer_sha256)
        return in_run
    prepared = data or saved.data_directory or Path()
    if (prepared / DATA_MANIFEST).is_file():
        manifest = load_manifest(prepared)
        check_tokenizer(prepared, manifest)
        return prepared / manifest.tokenizer.directory
    raise DataError(f"{prepared}: no prepared data, so no tokenizer: give its folder with --data")


def open_tokenizer(path: Path, end_of_text: str | None = None) -> Tokenizer:
    """The tokenizer in a prepared folder, in a file, or in a Hugging Face folder.

    Args:
        end_of_text: the token that ends a text; None (default): the one that the folder names

    Raises:
        DataError: there is none.
    """
    settings = path / "tokenizer_config.json"
    if end_of_text is not None:
        return load_tokenizer(path, end_of_text)
    if not settings.is_file():
        return load_tokenizer(path)
    try:
        token = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError) as error:
        raise DataError(f"{settings}: cannot be read: {error}") from error
    token = token.get("content") if isinstance(token, dict) else token
    return load_tokenizer(path, token) if token else load_tokenizer(path)


def _check_parameters(reader: CheckpointReader | HuggingFaceReader, config: ModelConfig, context_length: int) -> None:
    """Refuse a model whose config is that of another one. Builds no model.

    Raises:
        CheckpointError: names the first parameter that differs.
    """
    found = {name: tuple(reader.shape(name)) for name in reader.names()}
    problem = not_the_parameters_of(config, context_length, found)
    if problem:
        raise CheckpointError(f"{reader.folder}: {problem}")
