"""fp16's dynamic loss scale falls, stays and grows when it should, is the same on all ranks, and resumes where it was."""

from collections.abc import Container

import pytest

from dsllm.config.train import LossScaleConfig
from dsllm.engine.build import Engine
from dsllm.engine.optimizers import set_learning_rate
from dsllm.engine.processes.process_group import World
from dsllm.engine.state import load_loss_scaler_state, loss_scaler_state
from dsllm.engine.step import take_step
from dsllm.objectives import TokenLoss
from tests.engine.instruments.test_diagnosis import BROKEN_ROW, Planted
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import micro_batches, tiny_engine, tiny_run

STAGES = (1, 2, 3)  # stage 0 is refused
SCALE = LossScaleConfig(initial_power=4, hysteresis=2, window_steps=3, minimum=4)
BAD_STEPS = {0, 1, 6, 7}
SCALES = [16, 16, 8, 8, 8, 8, 16, 16, 8]
"""The scale of each step. It endures the first overflow, halves at the second, and doubles when `window_steps` good steps
have followed the first good one; that also makes it endure an overflow again."""


def step_at(engine: Engine, step: int, bad: bool) -> tuple[float, bool]:
    """Take a step, a bad one with a NaN on the last rank alone: its scale, and whether it was applied."""
    world, config = engine.world, tiny_run(precision="fp16", loss_scale=SCALE)
    batches = micro_batches(config, step, world.data_rank, world.data_size)
    if bad and world.rank == world.size - 1:
        batches[0].inputs[0, 0] = BROKEN_ROW
    set_learning_rate(engine.optimizer, 1e-4)
    result = take_step(engine, batches, TokenLoss(), seed=step)
    return result.loss_scale, result.applied


def new_engine(world: World, stage: int) -> Engine:
    config = tiny_run(precision="fp16", loss_scale=SCALE)
    return tiny_engine(world, config, stage, Planted({}), device="cuda")


EXPECTED = {stage: [(scale, step not in BAD_STEPS) for step, scale in enumerate(SCALES)] for stage in STAGES}


def scales(world: World, resume_at: Container[int]) -> dict[int, list[tuple[float, bool]]]:
    """Scale and success of every step by stage; from each of `resume_at` on with a new engine."""
    found = {}
    for stage in STAGES:
        engine, rows = new_engine(world, stage), []
        for step in range(len(SCALES)):
            if step in resume_at:
                saved = loss_scaler_state(engine)
                engine = new_engine(world, stage)
                load_loss_scaler_state(engine, saved)
            rows.append(step_at(engine, step, step in BAD_STEPS))
        found[stage] = rows
    return found


@pytest.mark.slow
def test_the_scale_falls_after_hysteresis_and_doubles_after_the_window_on_all_ranks():
    assert run_ranks(2, scales, ()) == [EXPECTED, EXPECTED]


@pytest.mark.slow
def test_the_scale_resumes_where_it_was():
    """With one overflow endured, and in the middle of a window."""
    assert run_ranks(2, scales, (1, 4)) == [EXPECTED, EXPECTED]


def at_the_minimum(world: World) -> list[float]:
    """Scales of steps that are all bad."""
    engine = new_engine(world, 2)
    return [step_at(engine, step, True)[0] for step in range(6)]


def test_at_its_minimum_the_scale_stays_and_the_run_decides():
    assert run_ranks(2, at_the_minimum) == [[16, 16, 8, 4, 4, 4]] * 2
