"""Checks the fields of a run against each other; each problem names its field."""

import re
from collections.abc import Iterator

from dsllm.config.data import DataConfig, SourceConfig, TokenizerConfig
from dsllm.config.model import ModelConfig
from dsllm.config.run import RunConfig
from dsllm.config.train import ScheduleConfig, TrainConfig

Problem = tuple[str, str]
"""(dotted field, what is wrong and what to do)"""


def problems_in(config: RunConfig) -> list[Problem]:
    """Everything about the run that cannot work, whatever the machine."""
    return [
        *_check_data(config.data),
        *_check_tokenizer(config.tokenizer),
        *_check_model(config.model, config.data.sequence_length),
        *_check_train(config.train),
        *_check_kernels(config),
        *_check_schedule(config.train.schedule),
        *_check_rest(config),
        *_check_shards_have_a_tokenizer(config),
    ]


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
    yield from _positive("data", data, "sequence_length", "shard_megabytes")
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
        yield "data.sources", f"weight is given to {weighted} but not to {missing}; give it to all sources or to none"


def _check_shards_have_a_tokenizer(config: RunConfig) -> Iterator[Problem]:
    adopted = [s.name for s in config.data.sources if s.kind == "megatron"]
    if adopted and config.tokenizer.kind != "pretrained":
        yield (
            "tokenizer.kind",
            f"must be pretrained: the shards of {adopted} were made with a tokenizer already; give its path",
        )


def _check_source(where: str, source: SourceConfig) -> Iterator[Problem]:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", source.name):
        yield f"{where}.name", f"'{source.name}' becomes part of file names: use letters, digits, '-' and '_'"
    if source.kind in ("files", "megatron") and not source.paths:
        yield f"{where}.paths", f"is needed by kind {source.kind}"
    if source.kind == "dataset" and not source.dataset:
        yield f"{where}.dataset", "is needed by kind dataset: a name on the hub or a local folder"
    yield from _positive(where, source, "weight", "max_megabytes")


def _check_tokenizer(tokenizer: TokenizerConfig) -> Iterator[Problem]:
    if tokenizer.kind == "pretrained" and not tokenizer.path:
        yield "tokenizer.path", "is needed by kind pretrained: a tokenizer.json, a folder, or a .model file"
    if tokenizer.kind != "pretrained" and tokenizer.path:
        yield "tokenizer.path", f"is only read by kind pretrained, but kind is {tokenizer.kind}"
    if tokenizer.kind != "pretrained" and tokenizer.vocab_size < 257:
        yield (
            "tokenizer.vocab_size",
            f"must be at least 257 (256 bytes and the end-of-text token), but it is {tokenizer.vocab_size}",
        )
    if not tokenizer.end_of_text:
        yield "tokenizer.end_of_text", "must not be empty: every document ends with it"
    yield from _positive("tokenizer", tokenizer, "train_megabytes")


def _check_model(model: ModelConfig, sequence_length: int) -> Iterator[Problem]:
    sizes = (
        "num_layers",
        "hidden_size",
        "num_heads",
        "num_kv_heads",
        "head_size",
        "mlp_size",
        "vocab_size",
        "context_length",
    )
    too_small = list(_positive("model", model, *sizes, "norm_epsilon", "rope_theta"))
    yield from too_small
    yield from _not_negative("model", model, "initial_std")
    if too_small:
        return  # what follows divides by these
    if model.head_size is None and model.hidden_size % model.num_heads:
        yield (
            "model.num_heads",
            f"hidden_size {model.hidden_size} is not divisible by {model.num_heads}; or give head_size",
        )
    if model.num_heads % model.kv_heads:
        yield "model.num_kv_heads", f"num_heads {model.num_heads} is not divisible by {model.kv_heads}"
    if model.context_length is not None and model.context_length < sequence_length:
        yield "model.context_length", f"{model.context_length} is shorter than data.sequence_length {sequence_length}"
    if not 0 <= model.dropout < 1:
        yield "model.dropout", f"must be in [0, 1), but it is {model.dropout}"
    if model.positions == "rope":
        rotated = int(model.head_width * model.rope_fraction)
        if not 0 < model.rope_fraction <= 1 or rotated % 2 or rotated == 0:
            yield (
                "model.rope_fraction",
                f"rotates {rotated} of {model.head_width} head dimensions; it must be an even number above 0",
            )
    elif model.rope_scaling is not None:
        yield "model.rope_scaling", "needs positions: rope"


def _check_train(train: TrainConfig) -> Iterator[Problem]:
    yield from _positive(
        "train", train, "total_tokens", "global_batch_sequences", "micro_batch_sequences", "timeout_minutes"
    )
    yield from _not_negative("train", train, "gradient_clipping", "validate_every_steps", "validation_sequences")
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
            "moves what train.activation_checkpointing keeps, which is none: set that to full, attention, mlp or a number",
        )
    optimizer = train.optimizer
    yield from _not_negative("train.optimizer", optimizer, "learning_rate", "weight_decay")
    yield from _positive("train.optimizer", optimizer, "epsilon")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            yield f"train.optimizer.{name}", f"must be in [0, 1), but it is {getattr(optimizer, name)}"
    yield from _not_negative("train.loss_scale", train.loss_scale, "static", "initial_power", "minimum")
    yield from _positive("train.loss_scale", train.loss_scale, "window_steps", "hysteresis")


def _check_kernels(config: RunConfig) -> Iterator[Problem]:
    model, train = config.model, config.train
    if train.kernels == "torch":
        return
    if model.norm != "rmsnorm" and not model.qk_norm and model.mlp != "swiglu":
        yield "train.kernels", f"{train.kernels} has RMSNorm and SwiGLU, and this model neither: use torch"
    if train.compile:
        yield "train.kernels", f"{train.kernels} and train.compile: the compiler fuses these kernels itself; choose one"


def _check_schedule(schedule: ScheduleConfig) -> Iterator[Problem]:
    yield from _not_negative("train.schedule", schedule, "warmup_steps", "warmup_tokens", "decay_steps", "decay_tokens")
    for kind in ("warmup", "decay"):
        if getattr(schedule, f"{kind}_steps") is not None and getattr(schedule, f"{kind}_tokens") is not None:
            yield f"train.schedule.{kind}_tokens", f"{kind}_steps is given too; give one of them"
    if schedule.shape != "wsd" and (schedule.decay_steps is not None or schedule.decay_tokens is not None):
        yield "train.schedule.shape", f"decay_steps and decay_tokens belong to wsd, but shape is {schedule.shape}"
    if not 0 <= schedule.end_ratio <= 1:
        yield "train.schedule.end_ratio", f"must be in [0, 1], but it is {schedule.end_ratio}"


def _check_rest(config: RunConfig) -> Iterator[Problem]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.run.name):
        yield "run.name", f"'{config.run.name}' becomes a folder's name: use letters, digits, '.', '-' and '_'"
    yield from _not_negative("checkpoint", config.checkpoint, "every_steps", "every_minutes", "keep_every_steps")
    yield from _positive("checkpoint", config.checkpoint, "keep_last")
    yield from _positive("log", config.log, "every_steps", "peak_tflops")
    yield from _not_negative("log", config.log, "layer_statistics_every_steps")
    if config.log.layer_statistics_every_steps and config.train.compile:
        yield (
            "log.layer_statistics_every_steps",
            "cannot look into compiled layers: set train.compile to false for as long as the statistics are needed",
        )
