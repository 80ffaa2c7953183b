"""A candidate of the bench does one step in its turn and nothing between its turns."""

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.turns import Candidate, CandidateFailed, Runner

STEPS = "import time\nfor step in range(1, 1000):\n    time.sleep({seconds})\n    print('step', step, flush=True)"


def candidate(program: str) -> Candidate:
    return Candidate(name="counting", command=(sys.executable, "-S", "-c", program))


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    """A program that does a step in 20 ms, stopped after its first."""
    started = Runner(candidate(STEPS.format(seconds=0.02)), tmp_path, tmp_path / "log")
    started.wait_for_step(20)
    started.send(signal.SIGSTOP)
    yield started
    started.end()


def test_stops_between_turns(runner: Runner) -> None:
    runner.turn()
    lines = runner.log.read_text().count("step")
    time.sleep(0.1)  # long enough for five steps
    assert runner.log.read_text().count("step") == lines
    assert runner.turn() > 0
    assert runner.log.read_text().count("step") > lines


def test_knows_the_largest_memory(runner: Runner) -> None:
    assert 0.001 < runner.peak_memory_gib() < 1


def test_a_program_that_ends_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    failing = Runner(candidate("print('step 1'); print('no such device')"), tmp_path, tmp_path / "log")
    failing.wait_for_step(20)
    with pytest.raises(CandidateFailed, match="no such device"):
        failing.wait_for_step(20)
    failing.end()
