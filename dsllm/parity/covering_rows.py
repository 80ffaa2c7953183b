"""Which rows of the parity table cover a run, and which of its settings no row covers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsllm.config.run import RunConfig
from dsllm.engine.settings.final_config import final_config
from dsllm.engine.settings.key import NotCovered, Untouched, value_at
from dsllm.engine.settings.layout import Layout
from dsllm.engine.settings.table import TABLE
from dsllm.parity.combinations import DEEPSPEED_SETTINGS, WORLD_SIZES, Combination, full_product
from dsllm.parity.pairwise import pairwise_rows

RUN_NOT_COVERED = {
    "train.compile": "the compiler changes where a layer rounds; compared with eager layers at every stage in "
    "tests/engine/test_layers.py",
    "train.kernels=liger": "GPUs only",
    "train.activation_offload": "copies of activations; its gradients are compared bit by bit in "
    "tests/model/test_recompute.py",
}
"""Settings of the run that no row covers, each with what is known of it."""


@dataclass(frozen=True, kw_only=True)
class CoveringRows:
    """The rows that cover a run."""

    base: Combination
    """The row of the full product: stage, precision, accumulation, clipping, ranks."""
    settings: Mapping[str, tuple[Combination, ...]]
    """For each further setting the rows with this value, at this stage and in this precision."""
    not_covered: Mapping[str, str]
    """Settings that no row covers, with what is known of them."""


def settings_without_rows() -> list[tuple[str, str]]:
    """The accepted settings that the rows do not vary, each with the reason why it cannot change a number, or what is known."""
    untouched = [(path, key.parity.reason) for path, key in TABLE.items() if isinstance(key.parity, Untouched)]
    not_covered = [(path, key.parity.known) for path, key in TABLE.items() if isinstance(key.parity, NotCovered)]
    not_covered += [
        (f"{key.path}={value}", known)
        for key, covered in DEEPSPEED_SETTINGS.values()
        for value, known in (covered.outside or {}).items()
    ]
    not_covered += RUN_NOT_COVERED.items()
    return [*untouched, *((name, f"not covered by a row: {known}") for name, known in not_covered)]


def covering_rows(config: RunConfig, given: Mapping[str, Any], layout: Layout) -> CoveringRows:
    """The rows that cover this run.

    Raises:
        ConfigError: the run is refused.
    """
    final = final_config(config, given, layout)
    mode = final["zero_optimization"]["stage"], layout.precision
    base = next(
        row
        for row in full_product()
        if (row.stage, row.precision) == mode
        and (row.accumulation > 1) == (final["gradient_accumulation_steps"] > 1)
        and row.clipping == (config.train.gradient_clipping > 0)
        # more ranks than the table has are covered by its largest number of ranks
        and row.world_size == max(size for size in WORLD_SIZES if size <= layout.data_size)
    )
    rows = [(row, row.as_dict()) for row in pairwise_rows() if (row.stage, row.precision) == mode]
    settings = {
        name: tuple(row for row, own in rows if own[name] in values)
        for name, values in _values(config, final, layout).items()
        if values
    }
    uncovered = [name for name, found in settings.items() if not found]
    assert not uncovered, f"no row of stage {mode[0]} in {mode[1]} has this {', '.join(uncovered)}"
    return CoveringRows(base=base, settings=settings, not_covered=_not_covered(config, final))


def _values(config: RunConfig, final: Mapping[str, Any], layout: Layout) -> dict[str, tuple[Any, ...]]:
    """The table's values that stand for the run's, by setting; () where no row covers the run's value.

    A number of elements is small or large compared with a model: rows of both kinds stand for it, as one of them is right.
    """
    train = config.train
    dynamic = layout.precision == "fp16" and not train.loss_scale.static
    recompute = train.activation_checkpointing
    of_json = {
        name: covered.rows_for(value)
        for name, (key, covered) in DEEPSPEED_SETTINGS.items()
        if (value := value_at(key.path, final)) is not None
    }
    return {
        "tied": (config.model.tie_embeddings,),
        "loss_scale": ("dynamic" if dynamic else "static",),
        "activation_checkpointing": (recompute if isinstance(recompute, str) else 2,),
    } | of_json


def _not_covered(config: RunConfig, final: Mapping[str, Any]) -> dict[str, str]:
    found = {
        path: key.parity.known
        for path, key in TABLE.items()
        if isinstance(key.parity, NotCovered) and value_at(path, final) not in (None, key.default)
    }
    for key, covered in DEEPSPEED_SETTINGS.values():
        value = value_at(key.path, final)
        if covered.outside and value in covered.outside:
            found[f"{key.path}={value}"] = covered.outside[value]
    used = {
        "train.compile": config.train.compile,
        "train.kernels=liger": config.train.kernels == "liger",
        "train.activation_offload": config.train.activation_offload,
    }
    return found | {name: RUN_NOT_COVERED[name] for name, is_used in used.items() if is_used}
