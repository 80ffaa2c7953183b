"""A job's processes are found by the variable that they inherit, signalled to save, and killed if they do not exit."""

import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsllm.launch.job import JOB_VARIABLE
from dsllm.launch.processes import end_processes, processes_of, ranks_among


@pytest.fixture
def job() -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex}.0"
    yield name
    for process in processes_of(name):
        process.kill()


def start(job: str, folder: Path, script: str, **variables: str) -> subprocess.Popen:
    """A process of the job that is ready."""
    environment = {**os.environ, JOB_VARIABLE: job, **variables}
    process = subprocess.Popen(["bash", "-c", script], cwd=folder, env=environment)
    deadline = time.monotonic() + 20
    while not (folder / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (folder / "ready").unlink()
    return process


def test_without_processes_there_is_nothing_to_end(job):
    assert not processes_of(job) and not end_processes(job, 0)


def test_ranks_save_and_exit(job, tmp_path):
    saving = "trap 'echo > saved; exit 75' TERM; echo > ready; while :; do sleep 0.05; done"
    with start(job, tmp_path, saving, RANK="0") as rank:
        assert end_processes(job, 20) and rank.wait(5) == 75
    assert (tmp_path / "saved").exists() and not processes_of(job)


def test_what_ignores_the_signal_is_killed(job, tmp_path):
    with start(job, tmp_path, "trap '' TERM; echo > ready; while :; do sleep 0.05; done", RANK="0") as rank:
        assert end_processes(job, 0.3) and rank.wait(5) == -9
    assert not processes_of(job)


def test_a_launcher_and_a_ranks_helper_are_not_ranks(job, tmp_path):
    rank = "(export RANK=0; bash -c 'sleep 60 & echo $$ > rank; wait') &"
    launcher = f"{rank} sleep 60 & until [ -s rank ]; do sleep 0.02; done; echo > ready; wait"
    with start(job, tmp_path, launcher) as process:
        found = processes_of(job)
        assert [rank.pid for rank in ranks_among(found)] == [int((tmp_path / "rank").read_text())] and len(found) >= 4
        assert end_processes(job, 0.3)
        process.wait(5)
