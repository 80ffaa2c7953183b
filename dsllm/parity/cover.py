"""The other factors: their values, what excludes what, and few combinations in which every allowed pair of values meets."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from dsllm.config.train import Precision
from dsllm.parity.combinations import Combination, full_product

MODE = "mode"
"""Stage and precision as one factor, so that each value of the others meets every stage in every precision."""

SMALL, LARGE = 1_000, 1_000_000
"""Elements: smaller than one matrix of the tiny model, and larger than all of it."""

FACTORS: dict[str, tuple[Any, ...]] = {
    MODE: tuple(dict.fromkeys((c.stage, c.precision) for c in full_product())),
    "world_size": (2, 4, 1),
    "accumulation": (3, 1),
    "clipping": (True, False),
    "tied": (False, True),
    "masked": (False, True),
    "loss_scale": ("static", "dynamic"),
    "activation_checkpointing": ("none", "full", "attention", "mlp", 2),
    "grad_accum_dtype": ("fp32", "bf16", "fp16"),
    "communication_data_type": ("fp32", "bf16", "fp16"),
    "reduce_scatter": (None, False, True),
    "prescale_gradients": (False, True),
    "gradient_predivide_factor": (1.0, 2.0),
    "reduce_bucket_size": (None, SMALL, LARGE),
    "allgather_bucket_size": (None, SMALL, LARGE),
    "allgather_partitions": (None, True, False),
    "overlap_comm": (None, False, True),
    "contiguous_gradients": (None, True, False),
    "sub_group_size": (None, SMALL, LARGE),
    "use_multi_rank_bucket_allreduce": (None, True, False),
    "ignore_unused_parameters": (None, True, False),
    "stage3_prefetch_bucket_size": (None, 0, SMALL, LARGE),
    "stage3_param_persistence_threshold": (None, 0, SMALL, LARGE),
    "stage3_model_persistence_threshold": (None, SMALL, LARGE),
    "stage3_max_live_parameters": (None, 0, SMALL, LARGE),
    "stage3_max_reuse_distance": (None, 0, SMALL, LARGE),
    "offload_optimizer": (None, "none", "cpu"),
    "offload_param": (None, "none", "cpu"),
    "zero_hpz_partition_size": (None, 1, 2),
}
"""None: the key is absent, as it must be where it means nothing."""

OF_STAGES_1_TO_3 = (
    "reduce_scatter", "reduce_bucket_size", "allgather_bucket_size", "allgather_partitions", "overlap_comm",
    "contiguous_gradients", "use_multi_rank_bucket_allreduce", "ignore_unused_parameters", "offload_optimizer",
)  # fmt: skip
OF_STAGE_3 = (
    "sub_group_size", "offload_param", "zero_hpz_partition_size", *(key for key in FACTORS if key.startswith("stage3_")),
)  # fmt: skip

SIXTEEN_BITS = ("bf16", "fp16")

Assignment = Mapping[str, Any]
"""Values of some of the factors."""


def pairwise_cover() -> list[Combination]:
    """Combinations in which every allowed pair of values of two factors meets; always the same.

    Greedy: each row starts from the first pair that is still missing, and gives every other factor the value that makes
    most new pairs with those set already.
    """
    missing = dict.fromkeys(allowed_pairs())
    rows = []
    while missing:
        row = _row_for(next(iter(missing)), missing)
        for pair in _pairs_of(row):
            missing.pop(pair, None)
        rows.append(as_combination(row))
    return rows


def as_combination(row: Assignment) -> Combination:
    """A combination of a value for every factor."""
    stage, precision = row[MODE]
    return Combination(stage=stage, precision=precision, **{k: v for k, v in row.items() if k != MODE})


Setting = tuple[str, Any]
Pair = tuple[Setting, Setting]


def allowed_pairs() -> Iterator[Pair]:
    """Every pair of values of two factors for which some stage and precision exists that allows both."""
    for first, second in itertools.combinations(FACTORS, 2):
        for a, b in itertools.product(FACTORS[first], FACTORS[second]):
            if any(allowed({MODE: mode, first: a, second: b}) for mode in _modes({first: a, second: b})):
                yield (first, a), (second, b)


def _modes(given: Assignment) -> tuple[Any, ...]:
    return (given[MODE],) if MODE in given else FACTORS[MODE]


def allowed(row: Assignment) -> bool:
    """Whether the values set so far can stand together. Each rule looks at the mode and one or two other factors."""
    stage, precision = row[MODE]
    return (
        all((stage > 0) == (row[key] is not None) for key in OF_STAGES_1_TO_3 if key in row)
        and all((stage == 3) == (row[key] is not None) for key in OF_STAGE_3 if key in row)
        and _allowed_dtypes(row, stage, precision)
        and (row.get("loss_scale") != "dynamic" or precision == "fp16")
        and _allowed_scaling(row, stage)
        and (row.get("zero_hpz_partition_size") != 2 or row.get("world_size") != 1)
    )


def _allowed_dtypes(row: Assignment, stage: int, precision: Precision) -> bool:
    """Gradients are summed as the weights are, or in fp32; they are sent in fp32, the weights' own 16 bits, or bf16."""
    own = precision if precision in SIXTEEN_BITS else "fp32"
    summed = ("fp32", own) if stage else (own,)
    sent = ("fp32", "bf16" if own == "fp32" else own)
    return row.get("grad_accum_dtype", own) in summed and row.get("communication_data_type", "fp32") in sent


def _allowed_scaling(row: Assignment, stage: int) -> bool:
    """DeepSpeed divides gradients before the sum only where it sums with all-reduce, and not in stage 3."""
    early = row.get("prescale_gradients") or row.get("gradient_predivide_factor", 1.0) != 1.0
    return not early or (stage < 3 and not row.get("reduce_scatter"))


def _row_for(pair: Pair, missing: Mapping[Pair, None]) -> dict[str, Any]:
    candidates = [
        _fill(dict(pair) | {MODE: mode}, missing) for mode in _modes(dict(pair)) if allowed(dict(pair) | {MODE: mode})
    ]
    return max(candidates, key=lambda row: sum(p in missing for p in _pairs_of(row)))


def _fill(row: dict[str, Any], missing: Mapping[Pair, None]) -> dict[str, Any]:
    for name, values in FACTORS.items():
        if name not in row:
            possible = [v for v in values if allowed(row | {name: v})]
            row[name] = max(possible, key=lambda v: sum(p in missing for p in _new_pairs(row, name, v)))
    return row


def _new_pairs(row: Assignment, name: str, value: Any) -> list[Pair]:
    order = list(FACTORS)
    return [_ordered((name, value), setting, order) for setting in row.items()]


def _ordered(a: Setting, b: Setting, order: list[str]) -> Pair:
    return (a, b) if order.index(a[0]) < order.index(b[0]) else (b, a)


def _pairs_of(row: Assignment) -> list[Pair]:
    return list(itertools.combinations([(name, row[name]) for name in FACTORS], 2))
