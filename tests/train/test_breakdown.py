"""The parts of a step add up to it in its row; the table names the rank that is slow."""

import pytest
import torch

from dsllm.engine.instruments.step_timer import StepTimer
from dsllm.train.breakdown import Breakdown, table


def watch_with(**seconds: float) -> StepTimer:
    watch = StepTimer(torch.device("cpu"), on=True)
    watch.seconds |= seconds
    return watch


def test_the_columns_add_up_to_the_step_and_the_first_step_is_left_out_of_the_means():
    breakdown = Breakdown(watch_with(forward=9.0))
    assert sum(breakdown.columns(10.0).values()) == 10.0
    assert breakdown.means()["forward"] == 9.0  # the only step so far
    for forward in (1.0, 3.0):
        breakdown.timer.seconds["forward"] = forward
        row = breakdown.columns(4.0)
        assert row["forward_seconds"] == forward and row["other_seconds"] == 4.0 - forward
    assert breakdown.means()["forward"] == 2.0 and breakdown.means()["other"] == 2.0


def test_a_watch_that_is_off_gives_no_columns():
    assert Breakdown(StepTimer(torch.device("cpu"), on=False)).columns(1.0) == {}


def test_the_table_names_the_slow_rank():
    slow = Breakdown(watch_with(data=0.3, communication=0.1))
    quick = Breakdown(watch_with(data=0.1, communication=0.3))
    for breakdown in (slow, quick):
        breakdown.columns(0.4)
    lines = table([quick.means(), slow.means()]).splitlines()
    (data,) = [line.split() for line in lines if line.startswith("data")]
    assert data[1:3] == ["200.00", "50.0%"] and " ".join(data[3:]) == "300.00 on rank 1, 100.00 on rank 0"
    shares = [float(line.split()[2].rstrip("%")) for line in lines[1:]]
    assert sum(shares) == pytest.approx(100)
