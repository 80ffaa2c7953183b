"""The kernels of norms and SwiGLU: torch's, or Liger's, which are written in Triton and run on GPUs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from dsllm.config.check import kernels_problem
from dsllm.config.train import Kernels as Name
from dsllm.errors import ConfigError, require
from dsllm.model.norm import rms_norm


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The functions that the model's modules call."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """x [..., d], weight [d], epsilon -> x / sqrt(mean(x^2) + epsilon) * weight, in x's dtype."""
    swiglu: Callable[[Tensor, Tensor], Tensor]
    """gate and up [..., inner] -> silu(gate) * up."""


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


TORCH = Kernels(rms_norm=rms_norm, swiglu=_swiglu)


def load_kernels(name: Name, device_type: str) -> Kernels:
    """The kernels called `train.kernels`.

    Args:
        device_type: "cpu" or "cuda"

    Raises:
        ConfigError: they do not run on this device
        MissingExtra: they are not installed
    """
    if name == "torch":
        return TORCH
    if problem := kernels_problem(name, device_type):
        raise ConfigError(problem)
    return liger_kernels()


def liger_kernels() -> Kernels:
    """Liger's RMSNorm and SwiGLU (Hsu et al. 2024).

    Its loss is not used, because it computes the gradient in the forward pass, before the weight of each token is known,
    and has no padded vocabulary.

    Raises:
        MissingExtra: liger-kernel or Triton is not installed
    """
    norm = require("liger_kernel.ops.rms_norm", "gpu").LigerRMSNormFunction
    product = require("liger_kernel.ops.swiglu", "gpu").LigerSiLUMulFunction
    return Kernels(rms_norm=partial(_liger_rms_norm, norm), swiglu=partial(_liger_swiglu, product))


def _liger_rms_norm(function: type, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    # "gemma": everything is computed in fp32, the product with the weight too
    out: Tensor = function.apply(x, weight, epsilon, 0.0, "gemma", False)  # type: ignore[attr-defined]
    return out


def _liger_swiglu(function: type, gate: Tensor, up: Tensor) -> Tensor:
    out: Tensor = function.apply(gate, up)  # type: ignore[attr-defined]
    return out
