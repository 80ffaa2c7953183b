"""The held-out loss: summed over every counted token of every rank, then loss, perplexity and bits per byte."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dsllm.objectives import ModelOutput


class HeldOutBatch(Protocol):
    """Inputs and targets [B, T]; how much each target counts, None: fully; and each token's document, None: one."""

    @property
    def inputs(self) -> torch.Tensor: ...
    @property
    def targets(self) -> torch.Tensor: ...
    @property
    def weights(self) -> torch.Tensor | None: ...
    @property
    def documents(self) -> torch.Tensor | None: ...


class HeldOutBatches(Protocol):
    """Batches of one pass over held-out tokens; every rank has the same number of them."""

    @property
    def text_bytes(self) -> int | None:
        """UTF-8 bytes of the documents that the counted tokens stand for, over all ranks; None: not known."""
        ...

    def __iter__(self) -> Iterator[HeldOutBatch]: ...


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """What a pass over held-out text measured."""

    loss: float
    """Mean loss per token, end-of-text included, in nats."""
    num_tokens: int
    text_bytes: int | None
    """UTF-8 bytes of the documents; None where the text is not known."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """Loss of all tokens in bits, per UTF-8 byte of the documents: comparable between tokenizers, and with xz."""
        return self.loss * self.num_tokens / math.log(2) / self.text_bytes if self.text_bytes else None


@torch.no_grad()
def validation_loss(
    model: Callable[..., ModelOutput],
    batches: HeldOutBatches,
    device: torch.device,
    sum_over_ranks: Callable[[Sequence[float]], list[float]] = list,
) -> HeldOutLoss:
    """Measure the held-out loss; a collective call where there are several ranks.

    Args:
        model: called with inputs, targets and `documents`, each [B, T]; returns a loss per target, in nats.
        sum_over_ranks: sums numbers over the ranks.
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
    return HeldOutLoss(loss=loss_sum / num_tokens, num_tokens=int(num_tokens), text_bytes=batches.text_bytes)
