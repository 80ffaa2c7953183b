"""Precision in the DeepSpeed JSON: in which type gradients add up and travel, and what is refused and why."""

from collections.abc import Iterator, Mapping
from typing import Any

from dsllm.config.train import Precision
from dsllm.engine.settings.layout import Layout

AUTO = "auto"
WIDTHS: dict[Precision, str] = {"fp32": "fp32", "fp32_compute_bf16": "fp32", "bf16": "bf16", "fp16": "fp16"}
"""The type that the parameters have, and their gradients as backward makes them, by precision."""

ACCUMULATION = "data_types.grad_accum_dtype"
COMMUNICATION = "communication_data_type"

FP8 = "fp8 is refused until a GPU run has proven its numbers; use train.precision bf16"


def check_precision(given: Mapping[str, Any], layout: Layout, stage: Any) -> Iterator[str]:
    """Everything about the precision that DeepSpeed refuses or computes wrongly, or that contradicts the run."""
    yield from _check_fp16(layout, stage)
    types = given.get("data_types", {})
    if not isinstance(types, Mapping):
        if types != AUTO:
            yield f"deepspeed JSON: data_types: must be an object, but it is {types!r}"
        types = {}
    for key in types:
        if key != "grad_accum_dtype":
            yield f"deepspeed JSON: data_types.{key}: unknown key; known is grad_accum_dtype"
    yield from _check_type(ACCUMULATION, types.get("grad_accum_dtype"), layout, stage)
    yield from _check_type(COMMUNICATION, given.get(COMMUNICATION), layout, stage)


def final_precision(given: Mapping[str, Any], layout: Layout, stage: int) -> dict[str, Any]:
    """The keys of precision as DeepSpeed gets them: gradients add up and travel in fp32 unless asked otherwise."""
    if layout.precision not in ("bf16", "fp16") or stage == 0:
        return {}
    types = given.get("data_types", {})
    accumulation = types.get("grad_accum_dtype") if isinstance(types, Mapping) else None
    communication = given.get(COMMUNICATION)
    return {
        "data_types": {"grad_accum_dtype": "fp32" if accumulation in (None, AUTO) else accumulation},
        COMMUNICATION: "fp32" if communication in (None, AUTO) else communication,
    }


def _check_fp16(layout: Layout, stage: Any) -> Iterator[str]:
    if layout.precision != "fp16":
        return
    if layout.device == "cpu":
        yield (
            "train.precision: fp16, but this accelerator (cpu) has no fp16: use fp32_compute_bf16 (as fast as this CPU gets), "
            "fp32, or bf16; or leave train.precision at auto"
        )
    if stage == 0:
        yield (
            "train.precision: fp16 with ZeRO stage 0: DeepSpeed divides the gradients by a loss scale that it never applied; "
            "use ds_configs/zero1.json, which on one rank is the same thing done right"
        )


def _check_type(key: str, value: Any, layout: Layout, stage: Any) -> Iterator[str]:
    """One key's value: fp32, or the parameters' own 16 bits; gradients of fp32 parameters may travel in bf16."""
    if value in (None, AUTO):
        return
    own, where = WIDTHS[layout.precision], f"deepspeed JSON: {key}"
    sixteen_bits = {"fp32": "bf16" if key == COMMUNICATION else None}.get(own, own)
    allowed = ["fp32"] + ([sixteen_bits] if sixteen_bits else [])
    if value == "fp8":
        yield f"{where}: {FP8}"
    elif value not in ("fp32", "bf16", "fp16"):
        yield f"{where}: must be {' or '.join(repr(a) for a in allowed)}, but it is {value!r}"
    elif value not in allowed:
        yield f"{where}: {value} with train.precision {layout.precision} {_why(key, value, own)}: use {' or '.join(allowed)}"
    elif stage == 0 and value != own and key == ACCUMULATION:
        yield (
            f"{where}: {value} with train.precision {layout.precision} at ZeRO stage 0: DeepSpeed has no such optimizer there; "
            "use ds_configs/zero1.json, which on one rank is the same thing"
        )


def _why(key: str, value: str, own: str) -> str:
    if own == "fp32":
        return "would overflow" if key == COMMUNICATION else f"would round fp32 gradients to {value} at every addition"
    if key == ACCUMULATION:
        return f"would add up {own} gradients in a third type"
    return f"would send {own} gradients in a third type" + (
        ", and bf16 keeps 3 bits less than fp16" if own == "fp16" else ", and fp16 overflows where bf16 does not"
    )
