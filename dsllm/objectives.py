"""What a step minimises: an objective turns a model's output and a micro-batch into a sum, and says what it is divided by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dsllm.batches import MicroBatch

if TYPE_CHECKING:
    import torch


class ModelOutput(NamedTuple):
    """What the model returns for a micro-batch with targets. A named tuple, through which DeepSpeed's hooks find tensors."""

    losses: torch.Tensor
    """Cross-entropy of each target in nats, fp32 [B, T]."""
    auxiliary: Mapping[str, torch.Tensor]
    """Further losses by name, each a sum over the micro-batch's tokens, fp32 []; empty where the model has none."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An objective's value for one micro-batch."""

    loss_sum: torch.Tensor
    """What backward starts from, fp32 []: a sum, divided by the count of the whole global batch afterwards."""
    measures: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Further sums to report, divided by the same count, [] each."""


class Objective(Protocol):
    """Turns outputs into losses. The step divides by the sum of `count` over the global batch, whatever the layout."""

    @property
    def counts_every_target(self) -> bool:
        """Whether `count` is the number of targets in every micro-batch, so that no rank has to ask the others."""
        ...

    def count(self, batch: MicroBatch) -> float:
        """What this micro-batch adds to the divisor. Known before the forward pass."""
        ...

    def __call__(self, output: ModelOutput, batch: MicroBatch) -> Measured:
        """The micro-batch's sum, and further sums to report."""
        ...


@dataclass(frozen=True)
class TokenLoss:
    """The mean loss per counted token: pretraining, and tuning on masked targets."""

    weighted: bool = False
    """Whether micro-batches have weights. If not, every target counts 1 and the ranks need not agree on the count."""

    @property
    def counts_every_target(self) -> bool:
        """See Objective."""
        return not self.weighted

    def count(self, batch: MicroBatch) -> float:
        """Sum of the targets' weights."""
        if batch.weights is None:
            return float(batch.targets.numel())
        assert self.weighted, "a micro-batch has weights, but its objective counts every target"
        return float(batch.weights.sum())

    def __call__(self, output: ModelOutput, batch: MicroBatch) -> Measured:
        """Sum of the targets' losses, each times its weight."""
        losses = output.losses
        if batch.weights is not None:
            losses = losses * batch.weights.to(losses.device)
        return Measured(loss_sum=losses.sum())
