"""A job whose watch was killed is judged when its ranks are gone, by what they wrote last; others' runs are not waited for."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsllm.launch.follow import Waits
from dsllm.launch.job import JOB_VARIABLE
from dsllm.launch.processes import jobs_on_this_machine
from dsllm.launch.remaining import Remaining
from dsllm.run_directory import is_locked, write_status

RANK = """
import sys, time
from pathlib import Path
from dsllm.run_directory import lock_run, write_status
directory = Path(sys.argv[1])
lock = lock_run(directory, print)
write_status(directory, "running", attempt=1)
Path(sys.argv[1], "ready").touch()
time.sleep(float(sys.argv[2]))
write_status(directory, "interrupted", attempt=1, step=7)
time.sleep(0.3)
"""
"""Rank 0: holds the run's lock, saves for a while, and ends."""


@pytest.fixture
def job() -> Iterator[str]:
    yield (name := f"test-{uuid.uuid4().hex}")
    assert not jobs_on_this_machine(name), "left behind"


def start(directory: Path, seconds: float, **variables: str) -> subprocess.Popen:
    """Rank 0, until it has the lock."""
    environment = {k: v for k, v in os.environ.items() if k != JOB_VARIABLE} | variables
    rank = subprocess.Popen([sys.executable, "-c", RANK, str(directory), str(seconds)], env=environment)
    deadline = time.monotonic() + 30
    while not (directory / "ready").exists():
        assert time.monotonic() < deadline and rank.poll() is None
        time.sleep(0.02)
    return rank


@pytest.mark.slow
@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_ranks_that_save_are_waited_for(tmp_path, job, host):
    """On this machine they are found by their variable, on another host by the lock that rank 0 holds."""
    heard: list[str] = []
    variables = {JOB_VARIABLE: f"{job}.0"} if host == "here" else {}
    with start(tmp_path, 1.0, **variables) as rank:
        status = Remaining(job, tmp_path, {}).status(Waits(save=60, end=60), heard.append)
        assert status["state"] == "interrupted" and status["step"] == 7
        if host == "here":
            assert rank.wait(5) == 0
    assert len(heard) == 1 and "waiting at most 60 s while they save" in heard[0]


def test_ranks_that_never_end_are_killed_in_the_end(tmp_path, job):
    with start(tmp_path, 600, **{JOB_VARIABLE: f"{job}.1"}) as rank:
        began = time.monotonic()
        assert Remaining(job, tmp_path, {}).status(Waits(save=0.5, end=0.5), print)["state"] == "running"
        assert rank.wait(10) in (-15, -9) and time.monotonic() - began < 20


def test_what_is_over_or_belongs_to_others_is_not_waited_for(tmp_path, job):
    heard: list[str] = []
    waits = Waits(save=60, end=60)
    assert Remaining(job, tmp_path, {}).status(waits, heard.append) == {}
    write_status(tmp_path, "failed", attempt=1)
    assert Remaining(job, tmp_path, {}).status(waits, heard.append)["state"] == "failed"
    write_status(tmp_path, "running", attempt=1)  # rank 0 was killed: the kernel has released its lock
    assert Remaining(job, tmp_path, {}).status(waits, heard.append)["state"] == "running"
    (tmp_path / "other").mkdir()
    with start(tmp_path / "other", 5) as other:  # this job was refused, because that one is alive
        before = {"attempt": 1, "state": "running"}
        began = time.monotonic()
        assert Remaining(job, tmp_path / "other", before).status(waits, heard.append)["state"] == "running"
        assert time.monotonic() - began < 4 and is_locked(tmp_path / "other")
        other.kill()
    assert heard == []
