"""Per-token losses from the last hidden states, in chunks, so that full fp32 logits never exist."""

# N tokens, d width of the hidden state, V rows of the head (the padded vocabulary).

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24
"""Logits per chunk: 64 MiB in fp32."""

KEPT_ELEMENTS = 2**25
"""Up to so many logits are kept for the backward pass in the hidden state's dtype; beyond, they are computed again."""


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Cross-entropy of each token: -log softmax(hidden @ weight^T)[target], over the first vocab_size entries.

    Args:
        hidden: [..., d]
        weight: [V, d]; rows from vocab_size on are padding and take no part
        targets: [...], in [0, vocab_size)
    Returns:
        [...], fp32
    """
    losses: Tensor = _TokenLosses.apply(hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), vocab_size)
    return losses.view(targets.shape)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        cast = weight.to(hidden.dtype)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        normalizers = torch.empty_like(losses)
        keep = len(hidden) * len(weight) <= KEPT_ELEMENTS and any(ctx.needs_input_grad)
        kept = []
        for rows in _chunks(len(hidden), len(weight)):
            logits = _masked_logits(hidden[rows], cast, vocab_size)
            wide = logits.float()
            normalizers[rows] = torch.logsumexp(wide, -1)
            losses[rows] = normalizers[rows] - wide.gather(1, targets[rows, None]).squeeze(1)
            if keep:
                kept.append(logits)
        ctx.vocab_size = vocab_size
        ctx.save_for_backward(hidden, weight, targets, normalizers, *kept)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets, normalizers, *kept = ctx.saved_tensors
        cast = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for index, rows in enumerate(_chunks(len(hidden), len(weight))):
            logits = kept[index] if kept else _masked_logits(hidden[rows], cast, ctx.vocab_size)
            wide = logits.float().sub_(normalizers[rows, None]).exp_()  # the probabilities
            wide.scatter_add_(1, targets[rows, None], wide.new_full((len(wide), 1), -1.0))
            grad_logits = wide.mul_(grad[rows, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ cast
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _chunks(num_rows: int, row_elements: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // row_elements)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _masked_logits(hidden: Tensor, weight: Tensor, vocab_size: int) -> Tensor:
    logits = hidden @ weight.t()
    logits[:, vocab_size:] = float("-inf")
    return logits
