"""The final DeepSpeed config: one pure function of the run, a DeepSpeed JSON and the layout; every clash in one error."""

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsllm.config.paths import find_file, searched
from dsllm.config.run import RunConfig
from dsllm.engine.settings.gradients import check_gradients
from dsllm.engine.settings.layout import Layout
from dsllm.engine.settings.offload import OFFLOAD_OPTIMIZER, OFFLOAD_PARAM, ZEROPP_KEYS, check_offload, final_offload
from dsllm.engine.settings.precision import FP8, check_precision, final_precision
from dsllm.errors import ConfigError

__all__ = ["Layout", "final_config", "gradient_accumulation", "read_deepspeed_json"]

AUTO = "auto"

OWNED_BY_RUN = {
    "train_batch_size": "train.global_batch_sequences",
    "train_micro_batch_size_per_gpu": "train.micro_batch_sequences",
    "gradient_accumulation_steps": "global batch / (micro-batch x ranks)",
    "gradient_clipping": "train.gradient_clipping",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "activation_checkpointing": "train.activation_checkpointing",
}
"""Top-level keys that the run decides: in the JSON they may be absent, "auto", or say the same."""

OWNED_BY_JSON = {
    "zero_optimization", "communication_data_type", "data_types", "prescale_gradients", "gradient_predivide_factor",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler",
    "disable_python_gc", "log_level", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "aio",
}  # fmt: skip
"""Top-level keys that are handed on."""

REFUSED = {
    "compression_training": "removed from DeepSpeed 0.19",
    "curriculum_learning": "removed from DeepSpeed 0.19; the order of the data belongs to the run",
    "data_efficiency": "the order of the data belongs to the run",
    "checkpoint": "checkpoints are dsllm's own; DeepSpeed's are neither atomic nor checksummed",
    "load_universal_checkpoint": "checkpoints are dsllm's own and load under any layout",
    "elasticity": "a dsllm run resumes on any number of ranks as it is",
    "autotuning": "it starts runs of its own",
    "amp": "Apex AMP was removed from DeepSpeed 0.19; use train.precision",
    "tensorboard": "use log.tensorboard", "wandb": "metrics are written by dsllm", "csv_monitor": "see metrics.jsonl",
    "sparse_gradients": "the embeddings' gradients are dense",
    "gradient_allreduce_op": "the sum would scale gradients with the number of ranks; dsllm averages",
    "managed_gradient_accumulation": "the accumulation boundary belongs to dsllm's optimizer step",
    "tensor_parallel": "not supported by this version", "pipeline": "not supported by this version",
    "sequence_parallel_size": "not supported by this version: ZeRO 0-2 would not synchronise the sequence ranks",
    "zenflow": "it steps behind the gradients, with DeepSpeed's own CPU Adam; not proven here",
    "hybrid_engine": "it serves inference",
    "fp8": FP8,
}  # fmt: skip
"""Top-level keys that DeepSpeed knows and this version of dsllm refuses, with the reason."""

ZERO_KEYS: dict[str, Any] = {
    "stage": 0,
    "reduce_bucket_size": 50_000_000,
    "allgather_bucket_size": 50_000_000,
    "allgather_partitions": True,
    "reduce_scatter": True,
    "overlap_comm": False,
    "contiguous_gradients": True,
    "sub_group_size": 1_000_000_000,
    "use_multi_rank_bucket_allreduce": True,
    "ignore_unused_parameters": True,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_model_persistence_threshold": 2**63 - 1,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_gather_16bit_weights_on_model_save": False,
    "memory_efficient_linear": False,
}
"""zero_optimization: the keys that are handed on, and what is written where the JSON is silent or says "auto"."""

ZERO_REFUSED = {
    "round_robin_gradients": "trains right, but other tools then read wrong weights out of the engine; not proven here",
    "check_grad_overflow": "without it a non-finite gradient ruins the weights",
    "elastic_checkpoint": "its checkpoints cannot be loaded with torch's AdamW; dsllm's load under any layout",
    "load_from_fp32_weights": "weights are loaded by dsllm",
    "compute_grad_norm": "the gradient norm is reported at every step",
    "zero_quantized_nontrainable_weights": "no weight is frozen in pretraining",
    "mics_shard_size": "MiCS was removed from DeepSpeed 0.19",
    "mics_hierarchical_params_gather": "MiCS was removed from DeepSpeed 0.19",
    "cpu_offload": "removed from DeepSpeed; use offload_optimizer",
    "cpu_offload_params": "removed from DeepSpeed; use offload_param",
}  # fmt: skip
"""zero_optimization: keys that are refused unless they are false, with the reason."""


def read_deepspeed_json(name: str, beside: Path | None = None) -> dict[str, Any]:
    """The DeepSpeed JSON that a run names.

    Raises:
        ConfigError: missing, not JSON, or not an object; or a key is given twice.
    """
    path = find_file(name, beside)
    if path is None:
        raise ConfigError(f"deepspeed: file not found: {searched(name, beside)}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except (OSError, ValueError) as error:
        raise ConfigError(f"deepspeed: {path}: is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"deepspeed: {path}: holds a {type(value).__name__}; it must be an object")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"key given twice: {', '.join(sorted(twice))}")
    return dict(pairs)


def gradient_accumulation(config: RunConfig, world_size: int) -> int:
    """Micro-batches per rank and optimizer step.

    Raises:
        ConfigError: the global batch does not divide; names the nearest that do.
    """
    micro, batch = config.train.micro_batch_sequences, config.train.global_batch_sequences
    unit = micro * world_size
    if batch % unit == 0:
        return batch // unit
    below, above = batch // unit * unit, -(-batch // unit) * unit
    batches = " or ".join(str(b) for b in (below, above) if b)
    micros = [m for m in range(1, batch // world_size + 1) if batch % (m * world_size) == 0]
    nearest = sorted(sorted(micros, key=lambda m: abs(m - micro))[:2])
    mend = f"; or train.micro_batch_sequences {' or '.join(map(str, nearest))}" if nearest else ""
    raise ConfigError(
        f"train.global_batch_sequences {batch} is not divisible by micro-batch {micro} x {world_size} ranks = {unit}: "
        f"use train.global_batch_sequences {batches}{mend}"
    )


def final_config(config: RunConfig, given: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The config that DeepSpeed gets, complete: every key whose default surprises is written out.

    Raises:
        ConfigError: every clash between the run and the JSON, every unknown key and every refused combination, at once.
    """
    zero = given.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    problems = [*_check_top_level(given), *_check_zero(zero), *check_precision(given, layout, stage)]
    problems += [*check_gradients(given, layout), *check_offload(given, layout)]
    final: dict[str, Any] = {}
    try:
        final = _from_run(config, layout, stage)
    except ConfigError as error:
        problems += error.problems
    problems += _clashes(given, final, config)
    if problems:
        raise ConfigError(problems)
    final |= {key: value for key, value in given.items() if key in OWNED_BY_JSON and value != AUTO}
    final.pop("aio", None)  # written out below, where NVMe is used
    offload, around = final_offload(given, config, layout)
    final["zero_optimization"] = _final_zero(zero) | offload if stage else {"stage": 0}
    final |= around
    if layout.device == "cpu" and zero.get("reduce_scatter", AUTO) == AUTO and stage in (1, 2):
        final["zero_optimization"]["reduce_scatter"] = False  # gloo's reduce-scatter is slower than its all-reduce
    return final | final_precision(given, layout, stage)


def _final_zero(zero: Mapping[str, Any]) -> dict[str, Any]:
    final = ZERO_KEYS | {key: value for key, value in zero.items() if key in ZERO_KEYS and value != AUTO}
    return {key: value for key, value in final.items() if final["stage"] == 3 or not key.startswith("stage3_")}


def _from_run(config: RunConfig, layout: Layout, stage: int) -> dict[str, Any]:
    train, scale = config.train, config.train.loss_scale
    fp32 = layout.precision in ("fp32", "fp32_compute_bf16")
    return {
        "train_batch_size": train.global_batch_sequences,
        "train_micro_batch_size_per_gpu": train.micro_batch_sequences,
        "gradient_accumulation_steps": gradient_accumulation(config, layout.world_size),
        # DeepSpeed's fp32 ZeRO-0 neither reports the norm nor notices a non-finite one: the step does all three itself
        "gradient_clipping": 0.0 if fp32 and stage == 0 else train.gradient_clipping,
        "bf16": {"enabled": layout.precision == "bf16"},
        "fp16": {
            "enabled": layout.precision == "fp16",
            "loss_scale": scale.static,
            "initial_scale_power": scale.initial_power,
            "loss_scale_window": scale.window_steps,
            "hysteresis": scale.hysteresis,
            "min_loss_scale": scale.minimum,
        },
        "steps_per_print": 10**9,
    }


def _check_top_level(given: Mapping[str, Any]) -> Iterator[str]:
    known = [*OWNED_BY_RUN, *OWNED_BY_JSON, *REFUSED]
    for key, value in given.items():
        if key in REFUSED and value not in (False, None, {}):
            yield f"deepspeed JSON: {key}: {REFUSED[key]}"
        elif key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            yield f"deepspeed JSON: {key}: unknown key (DeepSpeed would ignore it silently){hint}"


def _check_zero(zero: Any) -> Iterator[str]:
    if not isinstance(zero, Mapping):
        yield f"deepspeed JSON: zero_optimization: must be an object, but it is {zero!r}"
        return
    for key, value in zero.items():
        where = f"deepspeed JSON: zero_optimization.{key}"
        if key in ZERO_REFUSED:
            if not _is_off(key, value):
                yield f"{where}: {ZERO_REFUSED[key]}"
        elif key in (OFFLOAD_OPTIMIZER, OFFLOAD_PARAM, *ZEROPP_KEYS):
            continue  # check_offload's
        elif key not in ZERO_KEYS:
            known = [*ZERO_KEYS, *ZERO_REFUSED, OFFLOAD_OPTIMIZER, OFFLOAD_PARAM, *ZEROPP_KEYS]
            close = difflib.get_close_matches(key, known, n=1)
            yield f"{where}: unknown key" + (f"; did you mean '{close[0]}'?" if close else "")
        elif value != AUTO:
            yield from _check_zero_value(where, key, value)


def _is_off(key: str, value: Any) -> bool:
    """A refused key may stand in the JSON with the value that switches it off."""
    if key in ("check_grad_overflow", "compute_grad_norm", "load_from_fp32_weights"):
        return value in (True, None, AUTO)
    return value in (False, None, AUTO)


def _check_zero_value(where: str, key: str, value: Any) -> Iterator[str]:
    if isinstance(ZERO_KEYS[key], bool):
        if not isinstance(value, bool):
            yield f"{where}: must be true or false, but it is {value!r}"
        elif key == "memory_efficient_linear" and value:
            yield f"{where}: it replaces torch.nn.functional.linear in the process, and rounds twice where there is a bias"
    elif isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
        yield f"{where}: must be a whole number, but it is {value!r}"
    elif key == "stage" and value not in (0, 1, 2, 3):
        yield f"{where}: must be 0, 1, 2 or 3, but it is {value}"


def _clashes(given: Mapping[str, Any], final: Mapping[str, Any], config: RunConfig) -> Iterator[str]:
    """Keys of the JSON that belong to the run and say something else."""
    wanted = dict(final) | {"gradient_clipping": config.train.gradient_clipping}
    for key, owner in OWNED_BY_RUN.items():
        value = given.get(key, AUTO)
        if value == AUTO or value is None:
            continue
        if key in ("bf16", "fp16") and isinstance(value, Mapping) and final:
            differing = {name: inner for name, inner in value.items() if inner not in (AUTO, final[key].get(name))}
            for name, inner in differing.items():
                says = final[key].get(name)
                yield f"deepspeed JSON: {key}.{name} is {inner!r}, but the run says {says!r} ({owner})"
        elif key in wanted:
            if value != wanted[key]:
                yield f"deepspeed JSON: {key} is {value!r}, but the run says {wanted[key]!r} ({owner})"
        elif final:
            yield f"deepspeed JSON: {key} belongs to the run: set {owner}, and remove it here"
