"""Gradients divided by the number of ranks before they are summed: what is proven passes, the rest is refused."""

from collections.abc import Iterator, Mapping
from typing import Any

from dsllm.engine.settings.layout import Layout

AUTO = "auto"


def check_gradients(given: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    """Every problem with prescale_gradients and gradient_predivide_factor."""
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        return
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
