"""A trained model from disk, without DeepSpeed or process groups: a run, a checkpoint or a Hugging Face folder."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dsllm.checkpoint.find import CHECKPOINTS, find_checkpoint
from dsllm.checkpoint.hugging_face import HuggingFaceReader, is_hugging_face_folder
from dsllm.checkpoint.read import CheckpointReader
from dsllm.config.load import run_from_dict
from dsllm.config.model import ModelConfig
from dsllm.config.run import RunConfig
from dsllm.config.train import Precision
from dsllm.data.manifest import FILE_NAME as DATA_MANIFEST
from dsllm.data.manifest import load_manifest
from dsllm.data.tokenizer import Tokenizer, load_tokenizer
from dsllm.engine.processes.device import compute_dtype, parameter_dtype
from dsllm.errors import CheckpointError, DataError
from dsllm.model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A model on disk, and what is known of it."""

    folder: Path
    """The checkpoint's folder, or the Hugging Face folder."""
    reader: CheckpointReader | HuggingFaceReader
    config: ModelConfig
    """Its shape, the vocabulary resolved."""
    context_length: int
    """Longest sequence it is made for, in tokens."""
    run: RunConfig | None = None
    """The run that trained it; None: it comes from a Hugging Face folder."""
    step: int | None = None
    """Optimizer steps it was trained for; None: not known."""
    precision: Precision | None = None
    """The one it was trained in; None: not known."""

    @property
    def run_directory(self) -> Path | None:
        """The run directory that the checkpoint lies in, if it does."""
        return self.folder.parent.parent if self.run and self.folder.parent.name == CHECKPOINTS else None


def open_saved(path: Path, tell: Callable[[str], None]) -> SavedModel:
    """The model meant by a path: a run directory (its newest sound checkpoint), a checkpoint, or a Hugging Face folder.

    Raises:
        CheckpointError: it is none of these, or what it holds cannot be used.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if is_hugging_face_folder(path):
        reader = HuggingFaceReader(path)
        config = reader.model_config
        assert config.context_length is not None, "every config.json that is read gives one"
        return SavedModel(folder=path, reader=reader, config=config, context_length=config.context_length)
    folder = find_checkpoint(path, tell)
    checkpoint = CheckpointReader(folder)
    run = run_from_dict(checkpoint.config, str(folder))
    return SavedModel(
        folder=folder,
        reader=checkpoint,
        config=run.model,
        context_length=run.context_length,
        run=run,
        step=checkpoint.step,
        precision=checkpoint.manifest.engine.get("precision"),
    )


def load_model(saved: SavedModel, precision: Precision, device: torch.device) -> Transformer:
    """Build a saved model for inference; takes the memory of the model and of one fp32 parameter.

    Raises:
        CheckpointError: what is saved are not this model's parameters.
    """
    config = dataclasses.replace(saved.config, dropout=0.0)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(
        parameter_dtype(precision)
    )  # so that the parameters are made in it: converted later, they would lose their tie
    try:
        with device:
            model = Transformer(config, saved.context_length, compute_dtype(precision))
    finally:
        torch.set_default_dtype(default_dtype)
    _check_parameters(saved, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved.reader.read_whole(name))
    return model.eval()


def find_tokenizer(saved: SavedModel, data: Path | None = None) -> Path:
    """Folder of the tokenizer that a model was trained with: given with the data, beside the model, or the run's own.

    Raises:
        DataError: there is none.
    """
    if data is None and saved.run is None:
        return saved.folder
    beside = saved.run_directory / "tokenizer" if saved.run_directory else None
    if data is None and beside is not None and beside.is_dir():
        return beside
    prepared = data or Path((saved.run.data.directory if saved.run else None) or "")
    if (prepared / DATA_MANIFEST).is_file():
        return prepared / load_manifest(prepared).tokenizer.directory
    raise DataError(f"{prepared}: no prepared data, so no tokenizer: give its folder with --data")


def open_tokenizer(path: Path, end_of_text: str | None = None) -> Tokenizer:
    """The tokenizer in a prepared folder, in a file, or in a Hugging Face folder, which says elsewhere what ends a text.

    Args:
        end_of_text: the token that ends a text, where it is not the one that the folder names

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


def _check_parameters(saved: SavedModel, model: Transformer) -> None:
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(saved.reader.shape(name)) for name in saved.reader.names()}
    wrong = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    if wrong:
        first = wrong[0]
        raise CheckpointError(
            f"{saved.folder}: {len(wrong)} parameters are not those of its config, the first: {first} is "
            f"{found.get(first, 'absent')}, not {wanted.get(first, 'there at all')}"
        )
