"""Checks the values of a run's fields and whether they fit together; each problem names its field."""

import codecs
import dataclasses
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dsllm.config.data import DataConfig, SourceConfig, TokenizerConfig
from dsllm.config.model import ModelConfig
from dsllm.config.run import RunConfig
from dsllm.config.train import CheckpointConfig, Kernels, ScheduleConfig, TrainConfig

Problem = tuple[str, str]
"""(dotted field, what is wrong with it and what to do)"""

LARGEST_NUMBER = 10**18
"""Of any field but the seed: what is computed from it still fits into 64 bits or a float."""
LARGEST_SEED = 10**30

PARALLEL_SIZES = ("tensor", "pipeline", "sequence", "expert")

MODEL_LIMITS = {
    "num_layers": 10_000,
    "hidden_size": 2**18,
    "num_heads": 2**14,
    "num_kv_heads": 2**14,
    "head_size": 2**16,
    "mlp_size": 2**22,
    "vocab_size": 2**24,
    "context_length": 2**27,
}


def problems_in(config: RunConfig) -> list[Problem]:
    """Everything in a run that cannot work on any machine."""
    if uncountable := list(_check_finite("", config)):
        return uncountable  # the checks below compute with these numbers
    return [
        *_check_data(config.data),
        *_check_tokenizer(config.tokenizer),
        *_check_model(config.model, config.data.sequence_length),
        *_check_train(config.train),
        *_positive("parallel", config.parallel, *PARALLEL_SIZES),
        *_at_most("parallel", config.parallel, **dict.fromkeys(PARALLEL_SIZES, 2**20)),
        *_check_kernels(config),
        *_check_schedule(config.train.schedule),
        *_check_run_name(config.run.name),
        *_check_checkpoint(config.checkpoint),
        *_check_log(config),
        *_check_shards_have_a_tokenizer(config),
    ]


def directory_problems(config: RunConfig) -> list[Problem]:
    """Whether the run and its data would write into one folder; where they are on this machine."""
    if "\0" in f"{config.run.directory}{config.data.directory}":
        return []  # refused as a path
    run, data = (Path(os.path.realpath(name or ".")) for name in (config.run.directory, config.data.directory))
    if run == data:
        how = "is also data.directory"
    elif run in data.parents:
        how = f"contains data.directory {config.data.directory}"
    elif data in run.parents:
        how = f"is inside data.directory {config.data.directory}"
    else:
        return []
    return [
        ("run.directory", f"{config.run.directory} {how}: each of them needs a folder of its own, outside the other")
    ]


def record_problems(config: RunConfig, file: Path) -> list[Problem]:
    """Whether the run would write its record over the file that it is read from, and that somebody wrote."""
    directory = Path(config.run.directory)
    if "\0" in config.run.directory or os.path.realpath(file) != os.path.realpath(directory / "run.yaml"):
        return []
    if any(os.path.exists(directory / name) for name in ("status.json", "checkpoints")):
        return []  # it is the record of a run, which continues
    return [
        (
            "run.directory",
            f"{directory} contains {file.name}, which the run would replace by its record: name another",
        )
    ]


def problems_in_model(model: ModelConfig) -> list[Problem]:
    """Everything in a model that cannot work, whatever it is trained on."""
    return [*_check_finite("model", model), *_check_model(model, sequence_length=1)]


def _check_finite(field: str, value: object) -> Iterator[Problem]:
    """Find numbers that are NaN or infinite (NaN passes every comparison with a limit below), or too large to count with."""
    if isinstance(value, float) and not math.isfinite(value):
        yield field, f"must be a finite number, but it is {value}"
    elif isinstance(value, int | float):
        largest = LARGEST_SEED if field == "run.seed" else LARGEST_NUMBER
        if abs(value) > largest:
            yield field, f"must be at most {largest:g}, but it is {_shown(value)}"
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _check_finite(f"{field}.{i}", item)
    elif dataclasses.is_dataclass(value):
        for child in dataclasses.fields(value):
            yield from _check_finite(f"{field}.{child.name}".lstrip("."), getattr(value, child.name))


def _shown(value: float) -> str:
    text = f"{value:,}" if isinstance(value, int) else f"{value:g}"
    return text if len(text) < 40 else f"{text[:20]}... ({len(text):,} characters)"


def _at_most(section: str, branch: object, **limits: float) -> Iterator[Problem]:
    """Limits far above what has been built: beyond them a number is a mistake, and counting or allocating would not end."""
    for name, limit in limits.items():
        value = getattr(branch, name)
        if value is not None and value > limit:
            yield f"{section}.{name}", f"must be at most {limit:,}, but it is {_shown(value)}"


def _positive(section: str, branch: object, *names: str) -> Iterator[Problem]:
    for name in names:
        value = getattr(branch, name)
        if value is not None and value <= 0:
            yield f"{section}.{name}", f"must be above 0, but it is {value}"


def _not_negative(section: str, branch: object, *names: str) -> Iterator[Problem]:
    for name in names:
        value = getattr(branch, name)
        if value is not None and value < 0:
            yield f"{section}.{name}", f"must not be below 0, but it is {value}"


def _check_data(data: DataConfig) -> Iterator[Problem]:
    yield from _positive("data", data, "sequence_length", "shard_megabytes", "verify_megabytes_per_second")
    yield from _at_most("data", data, sequence_length=MODEL_LIMITS["context_length"], num_workers=4096)
    yield from _not_negative("data", data, "num_workers")
    if not 0 <= data.validation_share < 1:
        yield "data.validation_share", f"must be in [0, 1), but it is {data.validation_share}"
    if not data.sources:
        yield "data.sources", "needs at least one source"
    names = [s.name for s in data.sources]
    for i, source in enumerate(data.sources):
        where = f"data.sources.{i}"
        if names.index(source.name) != i:
            yield f"{where}.name", f"'{source.name}' is already the name of source {names.index(source.name)}"
        yield from _check_source(where, source)
    weighted = [s.name for s in data.sources if s.weight is not None]
    if weighted and len(weighted) < len(names):
        missing = [n for n in names if n not in weighted]
        yield "data.sources", f"{weighted} have a weight and {missing} have none; set it for all sources or for none"


def _check_shards_have_a_tokenizer(config: RunConfig) -> Iterator[Problem]:
    adopted = [s.name for s in config.data.sources if s.kind == "megatron"]
    if adopted and config.tokenizer.kind != "pretrained":
        yield (
            "tokenizer.kind",
            f"must be pretrained: the sources {adopted} are token shards; set tokenizer.path to the tokenizer that made them",
        )


def _check_source(where: str, source: SourceConfig) -> Iterator[Problem]:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", source.name):
        yield f"{where}.name", f"'{source.name}' becomes part of file names: use letters, digits, '-' and '_'"
    if source.kind in ("files", "megatron") and not source.paths:
        yield f"{where}.paths", f"must be set for kind {source.kind}"
    if source.kind == "dataset" and not source.dataset:
        yield f"{where}.dataset", "must be set for kind dataset: a name on the hub or a local folder"
    if not _is_encoding(source.encoding):
        yield (
            f"{where}.encoding",
            f"'{source.encoding}' is not an encoding that Python knows: for example utf-8, latin-1, cp1252, utf-16",
        )
    elif source.kind != "files" and source.encoding != "utf-8":
        yield f"{where}.encoding", f"is used by kind files only, but kind is {source.kind}"
    yield from _positive(where, source, "weight", "max_megabytes")


def _is_encoding(name: str) -> bool:
    """Whether Python decodes bytes to text by this name; its list also has codecs between bytes, such as zlib."""
    try:
        return isinstance(b"".decode(name), str) and codecs.lookup(name).name not in ("undefined", "idna", "punycode")
    except (LookupError, ValueError):
        return False


def _check_tokenizer(tokenizer: TokenizerConfig) -> Iterator[Problem]:
    if tokenizer.kind == "pretrained" and not tokenizer.path:
        yield "tokenizer.path", "must be set for kind pretrained: a tokenizer.json, a folder, or a .model file"
    if tokenizer.kind != "pretrained" and tokenizer.path:
        yield "tokenizer.path", f"is used by kind pretrained only, but kind is {tokenizer.kind}"
    if tokenizer.kind != "pretrained" and tokenizer.vocab_size < 257:
        yield (
            "tokenizer.vocab_size",
            f"must be at least 257 (256 bytes and the end-of-text token), but it is {tokenizer.vocab_size}",
        )
    if not tokenizer.end_of_text:
        yield "tokenizer.end_of_text", "must not be empty: every document ends with it"
    if tokenizer.begin_of_text == "":
        yield "tokenizer.begin_of_text", "must not be empty: leave it out if documents begin with their text"
    if tokenizer.begin_of_text == tokenizer.end_of_text:
        yield "tokenizer.begin_of_text", "must not be the end_of_text, which is there between any two documents already"
    yield from _positive("tokenizer", tokenizer, "train_megabytes")
    yield from _at_most("tokenizer", tokenizer, vocab_size=MODEL_LIMITS["vocab_size"])


def _check_model(model: ModelConfig, sequence_length: int) -> Iterator[Problem]:
    impossible = [
        *_positive("model", model, *MODEL_LIMITS, "norm_epsilon", "rope_theta"),
        *_at_most("model", model, **MODEL_LIMITS),
    ]
    yield from impossible
    yield from _not_negative("model", model, "initial_std")
    if impossible:
        return  # the checks below divide by these
    if model.head_size is None and model.hidden_size % model.num_heads:
        yield (
            "model.num_heads",
            f"hidden_size {model.hidden_size} is not divisible by {model.num_heads}: change one of them, or set head_size",
        )
    if model.num_heads % model.kv_heads:
        yield "model.num_kv_heads", f"num_heads {model.num_heads} is not divisible by {model.kv_heads}"
    if model.context_length is not None and model.context_length < sequence_length:
        yield "model.context_length", f"{model.context_length} is shorter than data.sequence_length {sequence_length}"
    if not 0 <= model.dropout < 1:
        yield "model.dropout", f"must be in [0, 1), but it is {model.dropout}"
    yield from _check_rotary(model)


def _check_rotary(model: ModelConfig) -> Iterator[Problem]:
    scaling = model.rope_scaling
    if model.positions != "rope":
        if scaling is not None:
            yield "model.rope_scaling", "needs positions: rope"
        return
    if not 0 < model.rope_fraction <= 1:
        yield "model.rope_fraction", f"must be in (0, 1], but it is {model.rope_fraction}"
    elif (rotated := int(model.head_width * model.rope_fraction)) % 2 or rotated == 0:
        yield (
            "model.rope_fraction",
            f"rotates {rotated} of {model.head_width} head dimensions; it must be an even number above 0",
        )
    if scaling is None:
        return
    yield from _positive("model.rope_scaling", scaling, "factor", "low_frequency_factor", "original_context_length")
    if scaling.high_frequency_factor <= scaling.low_frequency_factor:
        yield (
            "model.rope_scaling.high_frequency_factor",
            f"must be above low_frequency_factor {scaling.low_frequency_factor}, "
            f"but it is {scaling.high_frequency_factor}",
        )


def _check_train(train: TrainConfig) -> Iterator[Problem]:
    yield from _positive(
        "train", train, "total_tokens", "global_batch_sequences", "micro_batch_sequences", "timeout_minutes"
    )
    yield from _not_negative("train", train, "gradient_clipping", "validate_every_steps", "validation_sequences")
    yield from _at_most("train", train, timeout_minutes=525_600)
    if train.micro_batch_sequences > train.global_batch_sequences > 0:
        yield (
            "train.micro_batch_sequences",
            f"{train.micro_batch_sequences} is more than global_batch_sequences {train.global_batch_sequences}",
        )
    if isinstance(train.activation_checkpointing, int) and train.activation_checkpointing < 1:
        yield (
            "train.activation_checkpointing",
            "must be none, full, attention, mlp, or every k-th block with k >= 1, "
            f"but it is {train.activation_checkpointing}",
        )
    if train.activation_offload and train.activation_checkpointing == "none":
        yield (
            "train.activation_offload",
            "has no effect while train.activation_checkpointing is none: set that to full, attention, mlp or a number",
        )
    optimizer = train.optimizer
    yield from _not_negative("train.optimizer", optimizer, "learning_rate", "weight_decay")
    yield from _positive("train.optimizer", optimizer, "epsilon")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            yield f"train.optimizer.{name}", f"must be in [0, 1), but it is {getattr(optimizer, name)}"
    yield from _not_negative("train.loss_scale", train.loss_scale, "static", "initial_power", "minimum")
    yield from _positive("train.loss_scale", train.loss_scale, "window_steps", "hysteresis")
    yield from _at_most("train.loss_scale", train.loss_scale, initial_power=100)


def _check_kernels(config: RunConfig) -> Iterator[Problem]:
    model, train = config.model, config.train
    if train.kernels == "torch":
        return
    if model.norm != "rmsnorm" and not model.qk_norm and model.mlp != "swiglu":
        yield (
            "train.kernels",
            f"{train.kernels} speeds up RMSNorm and SwiGLU, and this model uses neither: set it to torch",
        )
    if train.compile:
        yield (
            "train.kernels",
            f"{train.kernels} and train.compile cannot be combined, because the compiler fuses these layers itself",
        )


def kernels_problem(kernels: Kernels, device_type: str) -> str:
    """Why a device has no such kernels; empty: it may have them."""
    if kernels == "torch" or device_type == "cuda":
        return ""
    return f"train.kernels: {kernels}, but this device ({device_type}) has no Triton: use torch"


def _check_schedule(schedule: ScheduleConfig) -> Iterator[Problem]:
    yield from _not_negative("train.schedule", schedule, "warmup_steps", "warmup_tokens", "decay_steps", "decay_tokens")
    for kind in ("warmup", "decay"):
        if getattr(schedule, f"{kind}_steps") is not None and getattr(schedule, f"{kind}_tokens") is not None:
            yield f"train.schedule.{kind}_tokens", f"{kind}_steps is set too; set only one of them"
    if schedule.shape != "wsd" and (schedule.decay_steps is not None or schedule.decay_tokens is not None):
        yield "train.schedule.shape", f"must be wsd for decay_steps and decay_tokens, but it is {schedule.shape}"
    if not 0 <= schedule.end_ratio <= 1:
        yield "train.schedule.end_ratio", f"must be in [0, 1], but it is {schedule.end_ratio}"


def _check_run_name(name: str) -> Iterator[Problem]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        yield "run.name", f"'{name[:200]}' becomes a folder's name: use letters, digits, '.', '-' and '_'"
    elif len(name) > 200:
        yield "run.name", f"'{name[:50]}...' becomes a folder's name, and has {len(name):,} characters: at most 200"


def _check_checkpoint(checkpoint: CheckpointConfig) -> Iterator[Problem]:
    yield from _not_negative("checkpoint", checkpoint, "every_steps", "every_minutes", "keep_every_steps")
    yield from _positive("checkpoint", checkpoint, "keep_last")


def _check_log(config: RunConfig) -> Iterator[Problem]:
    yield from _positive("log", config.log, "every_steps", "peak_tflops")
    yield from _not_negative("log", config.log, "layer_statistics_every_steps")
    if config.log.layer_statistics_every_steps and config.train.compile:
        yield (
            "log.layer_statistics_every_steps",
            "cannot see inside compiled layers: set train.compile to false while you need the statistics",
        )
