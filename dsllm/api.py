"""What a notebook calls: a run's model and batches, saved models and their tokenizers. `dsllm` exports these names."""

import dataclasses
from pathlib import Path

import torch

from dsllm.checkpoint.find import find_checkpoint
from dsllm.checkpoint.read import CheckpointReader
from dsllm.config.run import RunConfig
from dsllm.config.train import Precision
from dsllm.data.manifest import Manifest, check_shards, check_tokenizer, load_manifest
from dsllm.data.position import Position
from dsllm.data.tokenizer import Tokenizer
from dsllm.data.training import TrainingBatches
from dsllm.data.validation import ValidationBatches
from dsllm.data.verify import check_held_out
from dsllm.engine.processes.device import compute_dtype
from dsllm.errors import ConfigError
from dsllm.evaluate import load, model_tokenizer
from dsllm.evaluate.generate import Sampling, generate
from dsllm.evaluate.perplexity import HeldOutLoss, validation_loss
from dsllm.model.initial import fill_initial
from dsllm.model.recompute import Recompute
from dsllm.model.transformer import Transformer
from dsllm.parameters import parameter_table

__all__ = [
    "CheckpointReader",
    "HeldOutLoss",
    "Position",
    "Sampling",
    "Tokenizer",
    "TrainingBatches",
    "Transformer",
    "ValidationBatches",
    "build_model",
    "generate",
    "load_model",
    "load_tokenizer",
    "open_checkpoint",
    "training_batches",
    "validation_batches",
    "validation_loss",
]


def build_model(run: RunConfig, precision: Precision = "fp32") -> Transformer:
    """The run's model with its initial values, on the CPU, in training mode.

    Args:
        precision: fp32, or fp32_compute_bf16 for bf16 inside the layers. The parameters are fp32 in both.

    Raises:
        ConfigError: another precision, which only the engine trains in.
        DataError: the run leaves its vocabulary to the tokenizer, and the data is not prepared yet.
    """
    if precision not in ("fp32", "fp32_compute_bf16"):
        raise ConfigError(f"precision {precision}: only the engine trains in it; use fp32 or fp32_compute_bf16 here")
    run = with_vocabulary(run)
    recompute = Recompute(what=run.train.activation_checkpointing, offload=run.train.activation_offload)
    model = Transformer(run.model, run.context_length, compute_dtype(precision), recompute)
    fill_initial(model, parameter_table(run.model, run.context_length), run.run.seed)
    return model


def training_batches(run: RunConfig, data_rank: int = 0, data_size: int = 1) -> TrainingBatches:
    """The run's micro-batches: `training_batches(run).step(Position())` gives those of the first step.

    Args:
        data_rank: which data-parallel rank of `data_size` gets them.

    Raises:
        ConfigError: the global batch does not divide into micro-batches on so many ranks.
        DataError: the data is not prepared yet, is damaged, or was prepared from other sources.
    """
    train = run.train
    if train.global_batch_sequences % (train.micro_batch_sequences * data_size):
        raise ConfigError(
            f"train.global_batch_sequences {train.global_batch_sequences} is not a multiple of "
            f"{train.micro_batch_sequences} sequences x {data_size} ranks: change one of the three"
        )
    return TrainingBatches(
        _data_of(run),
        _checked_manifest(_data_of(run)),
        run.data,
        seed=run.run.seed,
        global_batch_sequences=train.global_batch_sequences,
        micro_batch_sequences=train.micro_batch_sequences,
        data_rank=data_rank,
        data_size=data_size,
    )


def validation_batches(run: RunConfig, max_sequences: int | None = None) -> ValidationBatches:
    """One pass over the run's held-out text, in which every token is predicted once.

    Args:
        max_sequences: use at most this many windows, spread evenly. None (default): all.

    Raises:
        DataError: the data is not prepared yet or is damaged.
    """
    manifest = _checked_manifest(_data_of(run))
    check_held_out(_data_of(run), manifest, print)
    return ValidationBatches(
        _data_of(run),
        manifest,
        sequence_length=run.data.sequence_length,
        micro_batch_sequences=run.train.micro_batch_sequences,
        max_sequences=max_sequences,
        document_mask=run.data.document_mask,
    )


def load_model(path: Path | str, precision: Precision = "fp32", device: torch.device | str = "cpu") -> Transformer:
    """The model in a run directory (its newest checkpoint), a checkpoint or a Hugging Face folder, in evaluation mode.

    Raises:
        CheckpointError: the folder has no model, or one that cannot be used.
    """
    return load.load_model(load.open_saved(Path(path), print), precision, torch.device(device))


def open_checkpoint(path: Path | str) -> CheckpointReader:
    """The checkpoint in a folder, or the newest one of a run directory; its files are verified first.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    return CheckpointReader(find_checkpoint(Path(path), print))


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a run directory, in a prepared or a Hugging Face folder, or in a file.

    Raises:
        DataError: there is none.
    """
    folder = Path(path) / "tokenizer"
    return model_tokenizer.open_tokenizer(folder if folder.is_dir() else Path(path))


def with_vocabulary(run: RunConfig) -> RunConfig:
    """The run with its vocabulary resolved from the prepared tokenizer.

    Raises:
        DataError: the data is not prepared yet.
    """
    if run.model.vocab_size is not None:
        return run
    vocab_size = load_manifest(_data_of(run)).tokenizer.vocab_size
    return dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=vocab_size))


def _data_of(run: RunConfig) -> Path:
    return Path(run.data.directory or f"data/{run.run.name}")


def _checked_manifest(directory: Path) -> Manifest:
    manifest = load_manifest(directory)
    check_shards(directory, manifest)
    check_tokenizer(directory, manifest)
    return manifest
