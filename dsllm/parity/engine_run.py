"""Trains the compared run as `dsllm train` does: with its config, engine and optimizer step, on the ranks of this job."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dsllm.engine.build import Engine
from dsllm.engine.instruments.fp16_on_cpu import fp16_on_cpu
from dsllm.engine.optimizers import set_learning_rate
from dsllm.engine.processes.process_group import World
from dsllm.engine.settings.final_config import final_config
from dsllm.engine.settings.layout import Layout
from dsllm.engine.state import owned_slices
from dsllm.engine.step import take_step
from dsllm.objectives import TokenLoss
from dsllm.parity.combinations import Combination
from dsllm.parity.tiny_run import NUM_STEPS, learning_rate, micro_batches, run_of
from dsllm.session.assembly import ready_engine
from dsllm.slices import WEIGHTS

Piece = tuple[str, int, np.ndarray]
"""Name of a parameter, first element of the range, fp32 values. numpy: a tensor would travel through /dev/shm."""


@dataclass(frozen=True)
class RankTrained:
    """What one rank reports of its training run."""

    losses: list[float]
    norms: list[float]
    applied: list[bool]
    pieces: list[Piece]
    """The final weights that this rank owns."""


def train_on_rank(world: World, combination: Combination, seed: int) -> RankTrained:
    """Train the tiny run through the engine; a collective call."""
    engine = make_engine(world, combination, seed)
    objective = TokenLoss(weighted=combination.masked)
    results = []
    for step in range(NUM_STEPS):
        set_learning_rate(engine.optimizer, learning_rate(step))
        batches = micro_batches(combination, seed, step, world.data_rank)
        results.append(take_step(engine, batches, objective, seed=step))
    return RankTrained(
        losses=[r.loss for r in results],
        norms=[r.gradient_norm for r in results],
        applied=[r.applied for r in results],
        pieces=[
            (piece.name, piece.region.start, piece.tensors[WEIGHTS].detach().cpu().numpy())
            for piece in owned_slices(engine)
        ],
    )


def make_engine(world: World, combination: Combination, seed: int) -> Engine:
    """The combination's engine at its initial weights, built as `dsllm train` builds one."""
    config = run_of(combination, seed)
    # as far as the checks are concerned, fp16 is on a GPU, where it is at home
    device = "cuda" if combination.precision == "fp16" else world.device.type
    layout = Layout(mesh=world.mesh, device=device, precision=combination.precision)
    final = final_config(config, combination.deepspeed_json(), layout)
    with fp16_on_cpu(combination.precision):
        return ready_engine(config, final, combination.precision, world)


def train_all_on_rank(world: World, combinations: Sequence[Combination], seed: int) -> Iterator[RankTrained]:
    """One combination after the other."""
    for combination in combinations:
        yield train_on_rank(world, combination, seed)
