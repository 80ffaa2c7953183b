"""The pairwise rows: few combinations in which every allowed pair of values of two factors meets."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from dsllm.config.train import Precision
from dsllm.engine.settings.key import ALL_STAGES
from dsllm.parity.combinations import DEEPSPEED_SETTINGS, Combination, full_product

MODE = "mode"
"""Stage and precision as one factor, so that each value of the others meets every stage in every precision."""

RUN_FACTORS: dict[str, tuple[Any, ...]] = {
    MODE: tuple(dict.fromkeys((c.stage, c.precision) for c in full_product())),
    "world_size": (2, 4, 1),
    "accumulation": (3, 1),
    "clipping": (True, False),
    "tied": (False, True),
    "masked": (False, True),
    "loss_scale": ("static", "dynamic"),
    "activation_checkpointing": ("none", "full", "attention", "mlp", 2),
}


def _json_factors() -> dict[str, tuple[Any, ...]]:
    """The DeepSpeed JSON's factors. None: the key is absent, as it must be at the stages where it does not exist."""
    values = {
        name: covered.values if key.stages == ALL_STAGES else (None, *covered.values)
        for name, (key, covered) in DEEPSPEED_SETTINGS.items()
    }
    order = [name for name in values if name != "reduce_scatter"]
    # a row takes its values in this order, and reduce_scatter decides what these two may be
    order.insert(order.index("prescale_gradients"), "reduce_scatter")
    return {name: values[name] for name in order}


FACTORS: dict[str, tuple[Any, ...]] = RUN_FACTORS | _json_factors()
"""The values of every factor. A row is filled from the first factor to the last."""

SIXTEEN_BITS = ("bf16", "fp16")

Assignment = Mapping[str, Any]
"""Values of some of the factors."""


def pairwise_rows() -> list[Combination]:
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
    """The combination that has a row's value for every factor."""
    stage, precision = row[MODE]
    own = {name: value for name, value in row.items() if name in RUN_FACTORS and name != MODE}
    of_json = {name: value for name, value in row.items() if name in DEEPSPEED_SETTINGS and value is not None}
    return Combination(stage=stage, precision=precision, deepspeed=of_json, **own)


def as_assignment(combination: Combination) -> dict[str, Any]:
    """A combination's value for every factor: the inverse of `as_combination`."""
    values = combination.as_dict() | {MODE: (combination.stage, combination.precision)}
    return {name: values[name] for name in FACTORS}


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
    """Whether the values set so far can be combined. Each rule looks at the mode and one or two other factors."""
    stage, precision = row[MODE]
    return (
        all(_allowed_at_stage(name, value, stage) for name, value in row.items())
        and _allowed_dtypes(row, stage, precision)
        and (row.get("loss_scale") != "dynamic" or precision == "fp16")
        and _allowed_scaling(row, stage)
        and (row.get("zero_hpz_partition_size") != 2 or row.get("world_size") != 1)
    )


def _allowed_at_stage(name: str, value: Any, stage: int) -> bool:
    """A key of the DeepSpeed JSON has a value at the stages where it exists, and only there."""
    return name not in DEEPSPEED_SETTINGS or (value is not None) == (stage in DEEPSPEED_SETTINGS[name][0].stages)


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
