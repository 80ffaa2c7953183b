"""The learning rate against the schedules' formulas, and against torch's and transformers' own."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_wsd_schedule

from dsllm.config.data import DataConfig
from dsllm.config.optimizer import AdamWConfig
from dsllm.config.run import RunConfig, RunSection
from dsllm.config.train import ScheduleConfig, TrainConfig
from dsllm.train.schedule import learning_rate_at, seam

NUM_STEPS, TOKENS_PER_STEP = 50, 4 * 8


def run(**schedule) -> RunConfig:
    return RunConfig(
        run=RunSection(name="a", directory="a"),
        data=DataConfig(sequence_length=8),
        train=TrainConfig(
            total_tokens=NUM_STEPS * TOKENS_PER_STEP - 3,  # rounded up to whole steps
            global_batch_sequences=4,
            optimizer=AdamWConfig(learning_rate=2.0),
            schedule=ScheduleConfig(**schedule),
        ),
    )


def curve(**schedule) -> list[float]:
    return [learning_rate_at(step, run(**schedule)) for step in range(NUM_STEPS)]


def of_library(make, **settings) -> list[float]:
    """Learning rates of a torch scheduler, one per step, beginning with the first after its start."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = make(optimizer, **settings)
    rates = []
    for _ in range(NUM_STEPS):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates


def test_cosine_equals_transformers():
    expected = of_library(get_cosine_schedule_with_warmup, num_warmup_steps=10, num_training_steps=NUM_STEPS)
    assert curve(shape="cosine", warmup_steps=10, end_ratio=0.0) == pytest.approx(expected, abs=1e-12)


def test_wsd_equals_transformers():
    expected = of_library(
        get_wsd_schedule,
        num_warmup_steps=10,
        num_stable_steps=25,
        num_decay_steps=15,
        decay_type="linear",
        min_lr_ratio=0.1,
    )
    # transformers warms up from min_lr_ratio, we from zero: the stable part and the decay are compared
    assert curve(shape="wsd", warmup_steps=10, decay_steps=15)[9:] == pytest.approx(expected[9:], abs=1e-12)


def test_linear_is_a_line():
    rates = curve(shape="linear", warmup_steps=10, end_ratio=0.2)
    steps = {round(b - a, 12) for a, b in pairwise(rates[10:])}
    assert len(steps) == 1 and rates[-1] == pytest.approx(0.4) and rates[9] == 2.0


def test_constant_stays():
    assert set(curve(shape="constant")) == {2.0}


def test_lengths_in_tokens_are_rounded_up_to_steps():
    assert curve(warmup_tokens=9 * TOKENS_PER_STEP + 1) == curve(warmup_steps=10)
    assert curve(shape="wsd", decay_tokens=15 * TOKENS_PER_STEP) == curve(shape="wsd", decay_steps=15)


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 49, 50, 80])
def test_it_is_positive_and_never_above_the_peak(shape, warmup):
    rates = curve(shape=shape, warmup_steps=warmup)
    assert all(0 < rate <= 2.0 and math.isfinite(rate) for rate in rates)
    if warmup < NUM_STEPS:
        assert rates[-1] == pytest.approx(0.2)


def test_a_larger_budget_moves_the_end():
    longer = run(shape="wsd", decay_steps=10)
    longer = dataclasses.replace(longer, train=dataclasses.replace(longer.train, total_tokens=100 * TOKENS_PER_STEP))
    assert learning_rate_at(80, longer) == 2.0


def test_what_the_learning_rate_does_at_the_seam_is_said():
    short = run(shape="cosine", warmup_steps=10)
    longer = dataclasses.replace(short, train=dataclasses.replace(short.train, total_tokens=100 * TOKENS_PER_STEP))
    text = seam(NUM_STEPS, short, longer)
    before, now = learning_rate_at(NUM_STEPS - 1, short), learning_rate_at(NUM_STEPS, longer)
    assert now > 2 * before
    assert text == (
        f"the schedule now ends at step 100 instead of 50: the learning rate continues at {now:.3g} in step 51, "
        f"after {before:.3g} in step 50"
    )
    assert seam(20, short, short) == seam(0, short, longer) == ""
    constant = run(shape="constant")
    assert seam(20, constant, dataclasses.replace(constant, train=longer.train)) != ""  # another shape
    assert seam(20, constant, dataclasses.replace(constant, run=RunSection(name="b", directory="b"))) == ""
