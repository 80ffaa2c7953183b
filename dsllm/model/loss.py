"""Per-token losses from the last hidden states, in chunks, so that the logits never exist in fp32 all at once."""

# N tokens, d width of the hidden state, V rows of the head (the padded vocabulary).

from typing import Any

import torch
from torch import Tensor

from dsllm.counts import LOGITS_AT_A_TIME

WIDE_ELEMENTS = 2**24
WIDE_ELEMENTS_CPU = 2**20
"""Logits in fp32 at a time: 64 MiB; on CPUs 4 MiB, which stay in the cache from pass to pass."""

KEPT_ELEMENTS = LOGITS_AT_A_TIME
"""At most so many logits, one chunk, are kept for the backward pass, in the hidden state's dtype; more are computed again.
The head is last in the forward pass and first in the backward pass, so a chunk that is kept hardly adds to the peak."""


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Cross-entropy of each token: -log softmax(hidden @ weight^T)[target], over the first vocab_size entries.

    Args:
        hidden: [..., d]
        weight: [V, d]; rows from vocab_size on are padding and are masked
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
        keep = len(hidden) * len(weight) <= KEPT_ELEMENTS and any(ctx.needs_input_grad)
        kept = []
        for rows in _chunks(len(hidden), LOGITS_AT_A_TIME // len(weight)):
            logits = _masked_logits(hidden[rows], cast, vocab_size)
            losses[rows] = _losses_of(logits, targets[rows])
            if keep:
                kept.append(logits)
        ctx.vocab_size = vocab_size
        ctx.save_for_backward(hidden, weight, targets, losses, *kept)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets, losses, *kept = ctx.saved_tensors
        cast = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = None
        grad = grad.unsqueeze(1)  # stays fp32: rounded to bf16 it could scale the whole gradient wrongly by 0.4 %
        for index, rows in enumerate(_chunks(len(hidden), LOGITS_AT_A_TIME // len(weight))):
            logits = kept[index] if kept else _masked_logits(hidden[rows], cast, ctx.vocab_size)
            # Gradient of each loss: the probabilities, minus 1 at the target. There p - 1 = expm1(-loss), which loses no
            # digits in low precision. The incoming gradient scales rows, so it is applied to the smaller matrices below.
            grad_logits = torch.softmax(logits, -1)
            every_row = torch.arange(len(logits), device=logits.device)
            grad_logits[every_row, targets[rows]] = torch.expm1(-losses[rows]).to(logits.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad_logits @ cast) * grad[rows]
            if ctx.needs_input_grad[1]:
                part = grad_logits.t() @ (hidden[rows] * grad[rows]).to(hidden.dtype)
                grad_weight = part.float() if grad_weight is None else grad_weight.add_(part)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _chunks(num_rows: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _masked_logits(hidden: Tensor, weight: Tensor, vocab_size: int) -> Tensor:
    logits = hidden @ weight.t()
    logits[:, vocab_size:] = float("-inf")
    return logits


def _losses_of(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target], fp32 [N]; casts some rows to fp32 at a time."""
    parts = []
    elements = WIDE_ELEMENTS_CPU if logits.device.type == "cpu" else WIDE_ELEMENTS
    for rows in _chunks(len(logits), elements // logits.shape[1]):
        log_probabilities = torch.log_softmax(logits[rows].float(), -1)
        parts.append(log_probabilities.gather(1, targets[rows].unsqueeze(1)).squeeze(1).neg_())
    return torch.cat(parts)
