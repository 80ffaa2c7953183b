"""One micro-batch: the record that training, validation, parity, benchmarks and tests give to the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Which samples a micro-batch is made of."""

    first_sample: int
    """Number of its first sample, counted from 0 over the whole run."""
    last_sample: int
    sources: tuple[str, ...] = ()
    """Names of the sources they come from, sorted."""

    def __str__(self) -> str:
        where = f", from {', '.join(self.sources)}" if self.sources else ""
        return f"samples {self.first_sample} to {self.last_sample} of the run{where}"


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """The sequences of one rank for one forward pass: B sequences of T tokens. All tensors are on the CPU."""

    inputs: torch.Tensor
    """Token ids, int64 [B, T]."""
    targets: torch.Tensor
    """Token ids to predict, int64 [B, T]."""
    weights: torch.Tensor | None = None
    """How much each target counts, fp32 [B, T]; None: each counts 1."""
    documents: torch.Tensor | None = None
    """Number of each token's document in its sequence, rising, int64 [B, T]: tokens attend to their own document only.
    None: they attend to all tokens before them."""
    positions: torch.Tensor | None = None
    """Position of each token, int64 [B, T]; None: 0 to T - 1 in every sequence."""
    fingerprint: int = 0
    """64-bit hash of the samples as they were delivered; adds up over micro-batches and ranks. 0: not tracked."""
    origin: Origin | None = None
    """Which samples these are, for messages; None: not tracked."""
