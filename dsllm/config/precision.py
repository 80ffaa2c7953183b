"""Precision: what `auto` means on a device, and how wide parameters and activations are."""

from typing import Literal

from dsllm.config.train import Precision

Bits = Literal[16, 32]

_PARAMETER_BITS: dict[Precision, Bits] = {"fp32": 32, "fp32_compute_bf16": 32, "bf16": 16, "fp16": 16}
_COMPUTE_BITS: dict[Precision, Bits] = {"fp32": 32, "fp32_compute_bf16": 16, "bf16": 16, "fp16": 16}


def resolve_precision(requested: Precision | Literal["auto"], device_type: str) -> Precision:
    """The precision that a run uses on a device.

    Args:
        requested: `train.precision`; auto: the fastest precision whose numbers are right there
        device_type: "cpu" or "cuda"
    """
    if requested != "auto":
        return requested
    return "fp32_compute_bf16" if device_type == "cpu" else "bf16"


def parameter_bits(precision: Precision) -> Bits:
    """Bits of a weight as the layers see it, and of its gradient as backward makes it."""
    return _PARAMETER_BITS[precision]


def compute_bits(precision: Precision) -> Bits:
    """Bits of an activation between the layers."""
    return _COMPUTE_BITS[precision]


def has_fp32_parameters(precision: Precision) -> bool:
    """Whether the weights are the fp32 masters themselves, without a 16-bit copy."""
    return parameter_bits(precision) == 32
