"""`linear(x, weight, bias)`: the function behind every projection and the logits."""

from typing import Any

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias, computed in x's dtype; gradients have the parameters' dtype.

    The backward pass keeps x and the parameter itself, which it casts to x's dtype again. So no 16-bit copy of a weight
    outlives its layer, and ZeRO-3 can release a gathered weight between the passes. (torch by itself would keep the cast
    weight, or a transposed view that holds the gathered storage.)

    Args:
        x: [..., inputs]
        weight: [outputs, inputs], of any floating dtype
        bias: [outputs]
    Returns:
        [..., outputs], in x's dtype
    """
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        rows = x.reshape(-1, x.shape[-1])
        transposed = weight.to(x.dtype).t()
        out = rows @ transposed if bias is None else torch.addmm(bias.to(x.dtype), rows, transposed)
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        grad_rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_x = (grad_rows @ weight.to(grad.dtype)).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_rows.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_rows.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias
