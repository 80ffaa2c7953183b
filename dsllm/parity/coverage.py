"""Which rows of the table cover a run: every accepted setting finds its rows, or is named with the reason why not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsllm.config.run import RunConfig
from dsllm.engine.settings.final_config import final_config
from dsllm.engine.settings.layout import Layout
from dsllm.parity.combinations import Combination, full_product
from dsllm.parity.cover import FACTORS, LARGE, OF_STAGE_3, SMALL, pairwise_cover

UNTOUCHED = {
    "steps_per_print": "prints", "wall_clock_breakdown": "measures", "memory_breakdown": "measures",
    "dump_state": "prints", "comms_logger": "measures", "flops_profiler": "measures", "log_level": "prints",
    "disable_python_gc": "when Python frees what nobody uses any more",
    "zero_allow_untested_optimizer": "the optimizer is torch's AdamW, which DeepSpeed knows as tested",
    "zero_force_ds_cpu_optimizer": "true is refused; false keeps torch's AdamW, as in every row",
    "zero_optimization.memory_efficient_linear": "true is refused; false in every row",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "for a saver of DeepSpeed's that is not used",
    "zero_optimization.offload_optimizer.pin_memory": "where the copy lies", "zero_optimization.offload_param.pin_memory":
    "where the copy lies",
}  # fmt: skip
"""Settings that cannot touch a number, each with the reason."""

OUTSIDE = {
    "aio": "how NVMe is read and written; as offload to NVMe",
    "zero_optimization.offload_optimizer=nvme": "the model here is too small to be swapped (DeepSpeed swaps from 1 MiB on), "
    "and the operator must be built first",
    "zero_optimization.offload_param=nvme": "as above",
    "zero_optimization.zero_quantized_weights": "rounds weights to 8 bits on purpose; GPUs only",
    "zero_optimization.zero_quantized_gradients": "rounds gradients to 4 bits on purpose; several nodes of GPUs only",
    "train.compile": "the compiler changes where a layer rounds; compared with eager layers at every stage in "
    "tests/engine/test_layers.py",
    "train.kernels=liger": "GPUs only",
    "train.activation_offload": "copies of activations; its gradients are compared bit by bit in "
    "tests/model/test_recompute.py",
}  # fmt: skip
"""Accepted settings that no row covers, each with what is known of it."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The rows that cover a run."""

    base: Combination
    """The row of the full product: stage, precision, accumulation, clipping, ranks."""
    settings: Mapping[str, tuple[Combination, ...]]
    """For each further setting the rows with this value, at this stage and in this precision."""
    outside: Mapping[str, str]
    """Settings that no row covers, with what is known of them."""


def untouched() -> list[tuple[str, str]]:
    """UNTOUCHED and OUTSIDE for the page, in order."""
    return [*UNTOUCHED.items(), *((name, f"not covered by a row: {why}") for name, why in OUTSIDE.items())]


def coverage(config: RunConfig, given: Mapping[str, Any], layout: Layout) -> Coverage:
    """The rows that cover this run.

    Raises:
        ConfigError: the run is refused.
    """
    final = final_config(config, given, layout)
    stage, train = final["zero_optimization"]["stage"], config.train
    base = next(
        row
        for row in full_product()
        if (row.stage, row.precision) == (stage, layout.precision)
        and (row.accumulation > 1) == (final["gradient_accumulation_steps"] > 1)
        and row.clipping == (train.gradient_clipping > 0)
        and row.world_size == min(layout.world_size, 4) - (layout.world_size == 3)
    )
    values = _values(config, final, layout)
    rows = [row for row in pairwise_cover() if (row.stage, row.precision) == (stage, layout.precision)]
    settings = {
        name: tuple(row for row in rows if getattr(row, name) in classes) for name, classes in values.items() if classes
    }
    uncovered = [name for name, found in settings.items() if not found]
    assert not uncovered, f"no row of stage {stage} in {layout.precision} has this {', '.join(uncovered)}"
    return Coverage(base=base, settings=settings, outside=_outside(config, final))


def _values(config: RunConfig, final: Mapping[str, Any], layout: Layout) -> dict[str, tuple[Any, ...]]:
    """Per factor the values of the table that stand for the run's."""
    zero, train = final["zero_optimization"], config.train
    found: dict[str, tuple[Any, ...]] = {
        "tied": (config.model.tie_embeddings,),
        "loss_scale": ("static" if train.loss_scale.static or layout.precision != "fp16" else "dynamic",),
        "activation_checkpointing": (
            train.activation_checkpointing if isinstance(train.activation_checkpointing, str) else 2,
        ),
        "grad_accum_dtype": _stands_for("grad_accum_dtype", final.get("data_types", {}).get("grad_accum_dtype")),
    }
    for name in FACTORS:
        if (name in zero or name in final) and (zero["stage"] == 3 or name not in OF_STAGE_3):
            found[name] = _stands_for(name, zero.get(name, final.get(name)))
    return found


def _stands_for(name: str, value: Any) -> tuple[Any, ...]:
    """A number of elements is small or large beside a model: rows of both kinds, of which one is the run's."""
    if isinstance(value, Mapping):
        value = value["device"]
    if value is None or value == "nvme":
        return ()
    if SMALL in FACTORS[name] and value != 0:
        return (SMALL, LARGE)
    if name == "gradient_predivide_factor" and value != 1:
        return (2.0,)
    if name == "zero_hpz_partition_size" and value > 1:
        return (2,)
    return (value,) if value in FACTORS[name] else (SMALL,)


def _outside(config: RunConfig, final: Mapping[str, Any]) -> dict[str, str]:
    zero, train = final["zero_optimization"], config.train
    names = {
        "aio": "aio" in final,
        "zero_optimization.offload_optimizer=nvme": _device(zero, "offload_optimizer") == "nvme",
        "zero_optimization.offload_param=nvme": _device(zero, "offload_param") == "nvme",
        "zero_optimization.zero_quantized_weights": bool(zero.get("zero_quantized_weights")),
        "zero_optimization.zero_quantized_gradients": bool(zero.get("zero_quantized_gradients")),
        "train.compile": train.compile,
        "train.kernels=liger": train.kernels == "liger",
        "train.activation_offload": train.activation_offload,
    }
    return {name: OUTSIDE[name] for name, used in names.items() if used}


def _device(zero: Mapping[str, Any], key: str) -> str:
    return str(zero.get(key, {}).get("device", "none"))
