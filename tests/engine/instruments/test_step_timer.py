"""The parts of a step add up to it, and what is slow shows in its own part and nowhere else."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsllm.engine import deepspeed_library
from dsllm.engine.instruments.step_timer import PARTS, StepTimer, timing
from dsllm.engine.processes.process_group import World
from dsllm.engine.step import Instruments, take_step
from dsllm.objectives import TokenLoss
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import micro_batches, tiny_engine, tiny_run, tiny_step

DELAY = 0.8
"""Seconds: many times what a whole step of the tiny run takes, on a machine that does other things too."""


def test_a_part_does_not_count_what_is_inside_it():
    watch, began = StepTimer(torch.device("cpu"), on=True), time.perf_counter()
    with watch.part("backward"):
        time.sleep(0.02)
        with watch.part("communication"):
            time.sleep(0.03)
            with watch.part("communication"):
                time.sleep(0.02)
        time.sleep(0.01)
    seconds = time.perf_counter() - began  # however long the sleeps really took, nothing is counted twice
    assert watch.seconds["backward"] >= 0.03 and watch.seconds["communication"] >= 0.05
    assert sum(watch.seconds.values()) <= seconds
    watch.start_step()
    assert set(watch.seconds.values()) == {0.0}


def test_switched_off_it_measures_nothing():
    watch = StepTimer(torch.device("cpu"), on=False)
    with watch.part("forward"):
        time.sleep(0.001)
    assert set(watch.seconds.values()) == {0.0}


def delay_next_collective() -> None:
    """Let the next of DeepSpeed's collectives start late on this rank."""
    backend, waiting = deepspeed_library.deepspeed.comm.comm.cdb, [DELAY]
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        quick = getattr(backend, name)

        def late(*arguments: Any, quick: Callable[..., Any] = quick, **named: Any) -> Any:
            if waiting:
                time.sleep(waiting.pop())
            return quick(*arguments, **named)

        setattr(backend, name, late)


def watched_step(world: World, stage: int, slow: str) -> tuple[dict[str, float], float]:
    """Parts and seconds of a step in which something is slow on rank 1."""
    engine = tiny_engine(world, config := tiny_run(), stage, reduce_bucket_size=10**6)
    tiny_step(engine, config, 0)
    here = world.rank == 1
    if slow == "forward" and here:
        engine.module.norm.register_forward_hook(lambda *_: time.sleep(DELAY / 2))  # two micro-batches
    if slow == "collective" and here:
        delay_next_collective()
    with timing(world.device, on=True) as watch:
        world.barrier()
        began = time.perf_counter()
        with watch.part("data"):
            batches = micro_batches(config, 1, world.data_rank, world.data_size)
            time.sleep(DELAY if slow == "data" and here else 0.0)
        take_step(engine, batches, TokenLoss(), seed=1, instruments=Instruments(timer=watch))
        return watch.seconds, time.perf_counter() - began


def watched_steps(world: World, stage: int) -> dict[str, tuple[dict[str, float], float]]:
    return {slow: watched_step(world, stage, slow) for slow in ("data", "forward", "collective")}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))])
def test_a_slow_part_shows_in_its_column_and_on_the_other_rank_as_communication(stage):
    first, second = run_ranks(2, watched_steps, stage)
    for slow, (parts, seconds) in second.items():
        own = "communication" if slow == "collective" else slow
        assert parts[own] >= DELAY, (slow, parts)
        # how long it waits for the other rank is up to that one
        assert sum(parts[name] for name in PARTS if name not in (own, "communication")) < DELAY, (slow, parts)
        # beside the parts only the step's own lines run, for less than a millisecond on a machine that has time for them
        assert 0.8 * seconds < sum(parts.values()) <= seconds, (slow, parts)
    for slow, (parts, seconds) in first.items():
        assert parts["communication"] > 0.9 * DELAY, (slow, parts)
        assert sum(parts[name] for name in PARTS if name != "communication") < DELAY, (slow, parts)
        assert 0.8 * seconds < sum(parts.values()) <= seconds, (slow, parts)


def collectives_left(world: World) -> list[str]:
    backend = deepspeed_library.deepspeed.comm.comm.cdb
    before = set(vars(backend))
    with timing(world.device, on=True):
        assert set(vars(backend)) > before
    return sorted(set(vars(backend)) - before)


def test_afterwards_deepspeeds_collectives_are_as_before():
    assert run_ranks(1, collectives_left) == [[]]
