"""One optimizer step: forward and backward over the micro-batches, then the update. Nothing else takes steps."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dsllm.engine.build import Engine
from dsllm.engine.instruments.layer_statistics import LayerStatistics
from dsllm.engine.instruments.step_timer import UNWATCHED, Watch


class MicroBatch(Protocol):
    """What the step needs of a batch."""

    @property
    def inputs(self) -> torch.Tensor:
        """Token ids [b, T]."""
        ...

    @property
    def targets(self) -> torch.Tensor:
        """Token ids [b, T]."""
        ...

    @property
    def weights(self) -> torch.Tensor | None:
        """How much each target counts [b, T]; None: all count 1."""
        ...

    @property
    def documents(self) -> torch.Tensor | None:
        """Number of each token's document in its sequence [b, T], on the CPU; None: they are not told apart."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step measured. The same on all ranks."""

    loss: float
    """Mean loss per counted token over the global batch, in nats, before the update."""
    tokens: int
    """Tokens that were read."""
    gradient_norm: float
    """Norm of the averaged gradient before clipping; not finite where the step was skipped."""
    applied: bool
    """False where a gradient was not finite: weights and moments are as before."""
    loss_scale: float
    """Factor on the loss during backward; 1 except in fp16."""
    sums: tuple[float, ...]
    """`also_sum`, summed over the ranks."""


def set_learning_rate(engine: Engine, learning_rate: float) -> None:
    """Learning rate of the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def take_step(
    engine: Engine,
    micro_batches: Sequence[MicroBatch],
    seed: int,
    also_sum: Sequence[float] = (),
    watch: Watch = UNWATCHED,
    layers: LayerStatistics | None = None,
) -> StepResult:
    """Take one optimizer step over this rank's micro-batches; a collective call.

    The gradient is that of the mean loss over all counted tokens of the global batch, whatever the layout.

    Args:
        seed: dropout's randomness is a function of this, the micro-batch and the rank.
        also_sum: numbers of this rank to be summed over all ranks in the step's one small all-reduce.
        watch: times the step's parts.
        layers: looks at this step's activations, gradients and update.
    """
    module, world = engine.deepspeed, engine.world
    counted = counted_tokens(engine, micro_batches)
    factor = loss_factor(engine, len(micro_batches), counted)
    loss_scale = loss_scale_of(engine)
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    tokens, norm, applied = 0, math.nan, True
    for i, batch in enumerate(micro_batches):
        with watch.part("forward"), layers.listening() if layers else contextlib.nullcontext():
            loss = summed_loss(engine, batch, seed, i)
        with watch.part("backward"):
            module.backward(loss * factor)
        last = i == len(micro_batches) - 1
        if layers and last:
            layers.before_update(loss_scale)
        with watch.part("optimizer"):
            if engine.wraps_nothing and last:
                norm, applied = _clip_gradients(engine)
            module.step()
        loss_sum += loss.detach()
        tokens += batch.inputs.numel()
    if not engine.wraps_nothing:
        norm, applied = float(module.get_global_grad_norm()), not engine.optimizer.overflow
    with watch.part("communication"):  # it waits for the slowest rank
        total, all_tokens, *sums = world.sum([float(loss_sum), float(tokens), *also_sum])
    return StepResult(
        loss=total / counted,
        tokens=int(all_tokens),
        gradient_norm=norm,
        applied=applied,
        loss_scale=loss_scale,
        sums=tuple(sums),
    )


def loss_scale_of(engine: Engine) -> float:
    """Factor on the loss during backward."""
    return float(engine.optimizer.loss_scale) if engine.precision == "fp16" else 1.0


def summed_loss(engine: Engine, batch: MicroBatch, seed: int, index: int) -> torch.Tensor:
    """Forward pass of the step's index-th micro-batch: the sum of its losses over the tokens that count."""
    device = engine.world.device
    torch.manual_seed(hash((seed, index, engine.world.rank)) % 2**63)  # a hash of ints is the same in every process
    # the documents stay on the host, which counts them; [b, T]
    losses = engine.deepspeed(batch.inputs.to(device), batch.targets.to(device), documents=batch.documents).losses
    return (losses if batch.weights is None else losses * batch.weights.to(device)).sum()


def loss_factor(engine: Engine, num_micro_batches: int, counted: float) -> float:
    """What summed losses are multiplied by before backward.

    DeepSpeed divides by the micro-batches of a rank and averages over ranks; the loss is a mean over counted tokens.
    """
    return num_micro_batches * engine.world.size / counted


def counted_tokens(engine: Engine, micro_batches: Sequence[MicroBatch]) -> float:
    """Weight of all targets of the global batch. Known without asking the others where every token counts."""
    if all(batch.weights is None for batch in micro_batches):
        return float(sum(batch.targets.numel() for batch in micro_batches) * engine.world.size)
    own = sum(b.targets.numel() if b.weights is None else float(b.weights.sum()) for b in micro_batches)
    return engine.world.sum([own])[0]


def _clip_gradients(engine: Engine) -> tuple[float, bool]:
    """What DeepSpeed leaves undone in fp32 at ZeRO stage 0: measure the norm, clip, and drop a gradient that is not finite."""
    parameters = [p for p in engine.module.parameters() if p.grad is not None]
    limit = engine.gradient_clipping or math.inf
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True))
    if math.isfinite(norm):
        return norm, True
    for p in parameters:  # AdamW passes over parameters without a gradient: neither weights nor moments move
        p.grad = None
    return norm, False
