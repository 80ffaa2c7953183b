"""Activation checkpointing: what is computed again in the backward pass, and where its inputs are kept until then."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsllm.config.train import ActivationCheckpointing


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """Which parts of the blocks keep only their input and are computed again in the backward pass.

    A recomputed part runs on the same input with the same dropout, so the gradients are equal to the last bit.
    """

    what: ActivationCheckpointing = "none"
    """none; full: every block; k: every k-th block; attention, mlp: that branch of every block, its norm included."""
    offload: bool = False
    """Keep those inputs in the CPU's memory."""

    def covers_block(self, layer: int) -> bool:
        """Whether the whole block is recomputed."""
        return self.what == "full" or (isinstance(self.what, int) and layer % self.what == 0)

    def covers(self, branch: Literal["attention", "mlp"]) -> bool:
        """Whether this branch of each block is recomputed."""
        return self.what == branch

    def apply(self, function: Callable[[Tensor], Tensor], x: Tensor, has_dropout: bool) -> Tensor:
        """function(x), keeping x alone for the backward pass."""
        with _kept_in_cpu_memory() if self.offload else contextlib.nullcontext():
            return checkpoint(function, x, use_reentrant=False, preserve_rng_state=has_dropout)


KEEP_ALL = Recompute()


def _kept_in_cpu_memory() -> contextlib.AbstractContextManager[object]:
    """Copies what autograd keeps inside the block to the CPU, and back when it is needed.

    torch's own `save_on_cpu` makes the host wait for every copy. Here both copies are queued behind the GPU's work. They
    use pinned memory, which torch reuses only after a copy has finished.
    """
    return torch.autograd.graph.saved_tensors_hooks(_to_cpu, _back)


def _to_cpu(x: Tensor) -> tuple[torch.device, Tensor]:
    kept = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.device.type != "cpu")
    return x.device, kept.copy_(x, non_blocking=True)


def _back(kept: tuple[torch.device, Tensor]) -> Tensor:
    device, x = kept
    return x.to(device, non_blocking=True)
