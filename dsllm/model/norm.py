"""RMSNorm and LayerNorm over the last dimension, computed in fp32; which kernel runs where."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight (Zhang and Sennrich 2019).

    Args:
        x: [..., d]
        weight: [d], of any floating dtype
    Returns:
        [..., d], in x's dtype
    """
    if x.device.type == "cpu":  # torch has no fused kernel for CPUs; this one takes a third of the time
        return _RMSNorm.apply(x, weight, epsilon)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), epsilon)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias (Ba et al. 2016). Shapes as in `rms_norm`."""
    if x.device.type == "cpu":  # for a bf16 x its kernel sums the parameters' gradients in bf16, which is 5 % off
        return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), epsilon).to(x.dtype)
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        # LayerNorm's fused kernel, given a mean of 0, computes this gradient up to one term: it assumes that the mean
        # depends on x, and subtracts the mean of grad * weight, which is added back below. The weight's gradient is
        # summed here, because the kernel would sum it in x's dtype.
        x, weight, inverse = ctx.saved_tensors
        wide_grad, wide_weight, width = grad.float(), weight.float(), x.shape[-1]
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, [width], torch.zeros_like(inverse), inverse, wide_weight, None, [True, False, False]
        )
        mean = (wide_grad @ wide_weight).div_(width).unsqueeze(-1) * inverse
        grad_weight = inverse.view(-1) @ (wide_grad * x.float()).view(-1, width)
        return grad_x.add_(mean.to(grad_x.dtype)), grad_weight.to(weight.dtype), None
