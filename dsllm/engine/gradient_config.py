"""How a DeepSpeed JSON has gradients summed and sent: what is proven passes, the rest is refused with the reason."""

from collections.abc import Iterator, Mapping
from typing import Any

from dsllm.engine.layout import Layout

AUTO = "auto"
SIXTEEN_BITS = ("bf16", "fp16")


def check_gradients(given: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    """Every problem with data_types, communication_data_type, prescale_gradients and gradient_predivide_factor."""
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        return
    yield from _check_sums(given.get("data_types", AUTO), zero.get("stage", 0), layout)
    yield from _check_sent(given.get("communication_data_type", AUTO), layout)
    yield from _check_scaling(given, zero, layout)


def _check_sums(asked: Any, stage: Any, layout: Layout) -> Iterator[str]:
    if asked in (AUTO, None):
        return
    where = "deepspeed JSON: data_types"
    if not isinstance(asked, Mapping):
        yield f"{where}: must be an object, but it is {asked!r}"
        return
    for key, value in asked.items():
        if key != "grad_accum_dtype":
            yield f"{where}.{key}: unknown key (DeepSpeed would ignore it silently); there is grad_accum_dtype"
        elif value is not None:
            yield from _check_sum(f"{where}.{key}", value, stage, layout.precision)


def _check_sum(where: str, value: Any, stage: Any, precision: str) -> Iterator[str]:
    own = precision if precision in SIXTEEN_BITS else "fp32"
    if value not in ("fp32", *SIXTEEN_BITS):
        yield f"{where}: must be fp32, bf16 or fp16, but it is {value!r}"
    elif stage == 0 and value != own:
        yield f"{where}: {value}: at ZeRO stage 0 DeepSpeed sums gradients in {own}, as the weights are; use stage 1"
    elif value not in ("fp32", own):
        yield f"{where}: {value} in a run in {precision}: gradients are summed in fp32" + (
            f", or in {own} to save memory" if own != "fp32" else ""
        )


def _check_sent(value: Any, layout: Layout) -> Iterator[str]:
    where, precision = "deepspeed JSON: communication_data_type", layout.precision
    if value in (AUTO, None):
        return
    if value not in ("fp32", *SIXTEEN_BITS):
        yield f"{where}: must be fp32, bf16 or fp16, but it is {value!r}"
    elif value == "fp16" and precision != "fp16":
        yield f"{where}: fp16 in a run in {precision}: without a loss scale small gradients vanish on the way; use bf16 or fp32"
    elif value == "bf16" and precision == "fp16":
        yield f"{where}: bf16 in a run in fp16 would drop 3 of the gradients' 11 bits; use fp16 or fp32"


def _check_scaling(given: Mapping[str, Any], zero: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    """Dividing gradients by the number of ranks before they are summed, wholly or in part."""
    prescale, factor = given.get("prescale_gradients", AUTO), given.get("gradient_predivide_factor", AUTO)
    where = "deepspeed JSON: "
    if prescale not in (True, False, None, AUTO):
        yield f"{where}prescale_gradients: must be true or false, but it is {prescale!r}"
    if factor not in (None, AUTO) and (isinstance(factor, bool) or not isinstance(factor, int | float) or factor <= 0):
        yield f"{where}gradient_predivide_factor: must be a number above 0, but it is {factor!r}"
    keys = [
        key
        for key, on in (
            ("prescale_gradients", prescale is True),
            ("gradient_predivide_factor", factor not in (None, AUTO) and factor != 1),
        )
        if on
    ]
    stage, scatter = zero.get("stage", 0), zero.get("reduce_scatter", AUTO)
    for key in keys:
        if stage == 3:
            yield (
                f"{where}{key}: not at ZeRO stage 3: DeepSpeed divides by the number of ranks before the sum as it is, and "
                "with a factor equal to it would divide twice"
            )
        elif stage in (1, 2) and (scatter is True or (scatter == AUTO and layout.device != "cpu")):
            yield f"{where}{key}: DeepSpeed heeds it with all-reduce only: set zero_optimization.reduce_scatter to false"
