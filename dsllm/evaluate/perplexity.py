"""Measures the held-out loss over all ranks, as loss per token, perplexity and bits per byte."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dsllm.batches import MicroBatch
from dsllm.errors import DataError
from dsllm.objectives import ModelOutput


class HeldOutBatches(Protocol):
    """Micro-batches of one pass over held-out tokens; every rank has the same number of them."""

    @property
    def text_bytes(self) -> int | None:
        """UTF-8 bytes of the documents that the counted tokens encode, over all ranks. None: not known."""
        ...

    def __iter__(self) -> Iterator[MicroBatch]: ...


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """The result of one pass over held-out text."""

    loss: float
    """Mean loss per token, end-of-text tokens included, in nats."""
    num_tokens: int
    text_bytes: int | None
    """UTF-8 bytes of the documents. None: the text is not known."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))  # math.exp overflows above 709

    @property
    def bits_per_byte(self) -> float | None:
        """Loss of all tokens in bits, per UTF-8 byte of the documents. Comparable between tokenizers, and with xz."""
        return self.loss * self.num_tokens / math.log(2) / self.text_bytes if self.text_bytes else None


def joined(parts: Sequence[HeldOutLoss]) -> HeldOutLoss:
    """The loss over several texts, each token counted once."""
    num_tokens = sum(part.num_tokens for part in parts)
    sizes = [part.text_bytes for part in parts]
    return HeldOutLoss(
        loss=math.fsum(part.loss * part.num_tokens for part in parts) / num_tokens,
        num_tokens=num_tokens,
        text_bytes=None if None in sizes else sum(size for size in sizes if size is not None),
    )


@torch.no_grad()
def validation_loss(
    model: Callable[..., ModelOutput],
    batches: HeldOutBatches,
    device: torch.device,
    sum_over_ranks: Callable[[Sequence[float]], list[float]] = list,
) -> HeldOutLoss:
    """Measure the held-out loss. With several ranks this is a collective call.

    Args:
        model: computes per-token losses [B, T], in nats, from inputs, targets and `documents` [B, T].
        batches: this rank's micro-batches.
        device: where `model` computes.
        sum_over_ranks: sums numbers over the ranks. Default: there is one rank.

    Raises:
        DataError: no token counts.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    counted = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        weights = torch.ones(batch.targets.shape) if batch.weights is None else batch.weights
        weights = weights.to(device, torch.float64)
        output = model(batch.inputs.to(device), batch.targets.to(device), documents=batch.documents)
        total += (output.losses * weights).sum()
        counted += weights.sum()
    loss_sum, num_tokens = sum_over_ranks([float(total), float(counted)])
    if num_tokens == 0:
        raise DataError("no held-out token counts: set data.validation_share above 0 and prepare the data again")
    return HeldOutLoss(loss=loss_sum / num_tokens, num_tokens=int(num_tokens), text_bytes=batches.text_bytes)
