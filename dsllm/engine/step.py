"""One optimizer step in two halves: accumulate gradients over the micro-batches, then update. Nothing else takes steps."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dsllm.batches import MicroBatch
from dsllm.engine.build import Engine
from dsllm.engine.instruments.layer_statistics import LayerStatistics
from dsllm.engine.instruments.step_timer import UNTIMED, StepTimer
from dsllm.engine.wrappers.wrapper import Outcome
from dsllm.errors import DataError
from dsllm.objectives import Measured, Objective


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """What measures a step while it runs."""

    timer: StepTimer = UNTIMED
    """Times the step's parts."""
    layers: LayerStatistics | None = None
    """Reads this step's activations, gradients and update."""


NO_INSTRUMENTS = Instruments()


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The numbers of one optimizer step. The same on all ranks."""

    loss: float
    """The objective over the global batch, before the update: for `TokenLoss` the mean per counted token, in nats."""
    tokens: int
    """Tokens that were read."""
    gradient_norm: float
    """Norm of the averaged gradient before clipping; not finite where the step was skipped."""
    applied: bool
    """False where a gradient was not finite: weights and optimizer state are as before."""
    loss_scale: float
    """Factor on the loss during backward; 1 except in fp16."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """The objective's other measures, divided as the loss is."""
    sums: tuple[float, ...] = ()
    """`also_sum`, summed over the ranks."""


@dataclass(kw_only=True)
class Sums:
    """What the micro-batches of this rank add up to."""

    loss: torch.Tensor
    """fp64 []"""
    tokens: int = 0
    measures: dict[str, torch.Tensor] = field(default_factory=dict)


def take_step(
    engine: Engine,
    batches: Sequence[MicroBatch],
    objective: Objective,
    seed: int,
    also_sum: Sequence[float] = (),
    instruments: Instruments = NO_INSTRUMENTS,
) -> StepResult:
    """Take one optimizer step over this rank's micro-batches; a collective call.

    The gradient is that of the objective over the global batch, whatever the layout.

    Args:
        batches: the same number on every rank
        seed: dropout's randomness is a function of this, the number of the micro-batch and the data-parallel rank
        also_sum: numbers to be summed over all ranks in the step's one small all-reduce

    Raises:
        DataError: no target of the global batch counts.
    """
    count = counted(engine, batches, objective)
    loss_scale = engine.loss_scale
    sums = accumulate_gradients(engine, batches, objective, seed, count, instruments)
    outcome = update(engine, instruments)
    names = sorted(sums.measures)
    own = [float(sums.loss), float(sums.tokens), *(float(sums.measures[name]) for name in names)]
    if not engine.world.is_first_reader:  # another rank reports the same samples
        own = [0.0] * len(own)
    with instruments.timer.part("communication"):  # it waits for the slowest rank
        loss, tokens, *others = engine.world.sum([*own, *also_sum])
    return StepResult(
        loss=loss / count,
        tokens=int(tokens),
        gradient_norm=outcome.gradient_norm,
        applied=outcome.applied,
        loss_scale=loss_scale,
        measures={name: value / count for name, value in zip(names, others, strict=False)},
        sums=tuple(others[len(names) :]),
    )


def accumulate_gradients(
    engine: Engine,
    batches: Sequence[MicroBatch],
    objective: Objective,
    seed: int,
    count: float,
    instruments: Instruments = NO_INSTRUMENTS,
) -> Sums:
    """First half of a step: forward and backward over the micro-batches. The last backward pass also reduces the gradients.

    Args:
        count: the divisor of the sum over the global batch
    """
    timer, layers = instruments.timer, instruments.layers
    factor = loss_factor(engine, len(batches), count)
    sums = Sums(loss=torch.zeros((), dtype=torch.float64, device=engine.world.device))
    for i, batch in enumerate(batches):
        if i > 0:
            # DeepSpeed counts micro-batches in `step`, which updates nothing before the last one
            with timer.part("optimizer"):
                engine.deepspeed.step()
        with timer.part("forward"), layers.listening() if layers else contextlib.nullcontext():
            measured = forward(engine, batch, objective, (seed, i))
        with timer.part("backward"):
            engine.deepspeed.backward(measured.loss_sum * factor)
        sums.loss += measured.loss_sum.detach()
        sums.tokens += batch.inputs.numel()
        for name, value in measured.measures.items():
            sums.measures[name] = value.detach().double() + sums.measures.get(name, 0.0)
    return sums


def update(engine: Engine, instruments: Instruments = NO_INSTRUMENTS) -> Outcome:
    """Second half of a step: clip the accumulated gradient and apply it; a gradient that is not finite is dropped."""
    if instruments.layers:
        instruments.layers.before_update(engine.loss_scale)
    with instruments.timer.part("optimizer"):
        return engine.wrapper.update(engine.gradient_clipping)


def forward(engine: Engine, batch: MicroBatch, objective: Objective, seed: tuple[int, int]) -> Measured:
    """Forward pass of one micro-batch.

    Args:
        seed: of the step, and the number of the micro-batch in it
    """
    device = engine.world.device
    # a hash of ints is the same in every process
    torch.manual_seed(hash((*seed, engine.world.data_rank)) % 2**63)
    # documents and positions stay on the host, which looks into them
    output = engine.deepspeed(
        batch.inputs.to(device), batch.targets.to(device), documents=batch.documents, positions=batch.positions
    )
    return objective(output, batch)


def loss_factor(engine: Engine, num_micro_batches: int, count: float) -> float:
    """The factor on a micro-batch's summed loss before backward.

    DeepSpeed divides by the micro-batches of a rank and averages over data-parallel ranks; the objective is a sum over the
    global batch, divided by `count`.
    """
    return num_micro_batches * engine.world.data_size / count


def counted(engine: Engine, batches: Sequence[MicroBatch], objective: Objective) -> float:
    """The divisor of the objective: its count over the whole global batch. A collective call where targets have weights.

    Raises:
        DataError: nothing counts, so the objective has no value.
    """
    own = sum(objective.count(batch) for batch in batches)
    if objective.counts_every_target:  # the same on every rank
        return float(own * engine.world.data_size)
    count = engine.world.sum([own], over="data")[0]
    if not count:
        origins = [str(batch.origin) for batch in batches if batch.origin is not None]
        where = f" ({origins[0]}, and what the other ranks read)" if origins else ""
        raise DataError(
            f"no target of this step counts: every weight of the global batch is 0{where}; "
            "check the masks of the data, or raise train.global_batch_sequences"
        )
    return count
