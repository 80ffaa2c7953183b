"""The watcher of a host: true codes, signals to the ranks themselves, nothing left behind, other jobs untouched."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dsllm.launch.job import JOB_VARIABLE
from dsllm.launch.processes import processes_of, ranks_among

RANK = """
trap 'echo saved > "$RANK.saved"; exit 75' TERM
echo $$ > "$RANK.started"
while :; do sleep 0.05; done
"""
LAUNCHER = """
for RANK in 0 1; do export RANK; bash rank.sh & done
trap '' TERM  # ignores the signal: the ranks must get it themselves
wait; wait; exit 3
"""


@pytest.fixture
def job(tmp_path) -> Iterator[str]:
    (tmp_path / "rank.sh").write_text(RANK)
    (tmp_path / "launcher.sh").write_text(LAUNCHER)
    name = f"test-{uuid.uuid4().hex}.0"
    yield name
    for process in processes_of(name):
        process.kill()


def watch(job: str, folder: Path, *words: str, save: float = 20, end: float = 20) -> subprocess.Popen:
    options = [f"--save-seconds={save}", f"--end-seconds={end}", *(w for w in words if w.startswith("--"))]
    command = [word for word in words if not word.startswith("--")] or ["bash", "launcher.sh"]
    return subprocess.Popen(
        [sys.executable, "-m", "dsllm.launch.node", "--node=0", *options, "--", *command],
        cwd=folder,
        env={**os.environ, JOB_VARIABLE: job, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 20
    while not all(file.is_file() and file.read_text() for file in files):
        assert time.monotonic() < deadline, files
        time.sleep(0.02)


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -KILL $$", 137)])
def test_the_watcher_returns_the_launchers_code(job, tmp_path, script, code):
    with watch(job, tmp_path, "bash", "-c", script) as process:
        assert process.wait(20) == code


@pytest.mark.slow
@pytest.mark.parametrize("stop_by", ["word", "end of input", "SIGTERM", "SIGHUP"])
def test_a_stop_reaches_every_rank_at_once_and_lets_it_save(job, tmp_path, stop_by):
    with watch(job, tmp_path) as process:
        wait_for(tmp_path / "0.started", tmp_path / "1.started")
        if stop_by == "word":
            process.stdin.write("stop\n")
            process.stdin.flush()
        elif stop_by == "end of input":
            process.stdin.close()
        else:
            process.send_signal(signal.Signals[stop_by])
        assert process.wait(20) == 3
    assert (tmp_path / "0.saved").is_file() and (tmp_path / "1.saved").is_file() and not processes_of(job)


def test_a_stop_before_there_are_ranks_ends_the_launcher(job, tmp_path):
    with watch(job, tmp_path, "bash", "-c", "echo > started; sleep 60") as process:
        wait_for(tmp_path / "started")
        process.stdin.write("stop\n")
        process.stdin.flush()
        assert process.wait(20) == 128 + signal.SIGTERM


def test_ranks_that_outlive_their_launcher_save_and_are_ended(job, tmp_path):
    """As when DeepSpeed's launch.py is killed: its ranks would go on for ever, and its caller would exit 0."""
    with watch(job, tmp_path) as process:
        wait_for(tmp_path / "0.started", tmp_path / "1.started")
        (launcher,) = psutil.Process(process.pid).children()
        launcher.kill()
        assert process.wait(20) == 137
        assert "outlived their launcher" in process.stderr.read()
    assert (tmp_path / "0.saved").is_file() and (tmp_path / "1.saved").is_file() and not processes_of(job)


@pytest.mark.slow
def test_a_rank_that_does_not_exit_in_time_is_killed(job, tmp_path):
    (tmp_path / "rank.sh").write_text("trap '' TERM; echo $$ > $RANK.started; while :; do sleep 0.05; done")
    began = time.monotonic()
    with watch(job, tmp_path, save=1) as process:
        wait_for(tmp_path / "0.started", tmp_path / "1.started")
        process.stdin.write("stop\n")
        process.stdin.flush()
        assert process.wait(20) == 137
    assert not processes_of(job) and time.monotonic() - began < 15


@pytest.mark.slow
def test_the_end_of_the_others_bounds_a_hanging_host(job, tmp_path):
    with watch(job, tmp_path, end=1) as process:
        wait_for(tmp_path / "0.started", tmp_path / "1.started")
        process.stdin.write("end\n")
        process.stdin.flush()
        assert process.wait(20) == 137
    assert not processes_of(job)


def test_another_jobs_processes_are_left_alone(job, tmp_path):
    other = {**os.environ, JOB_VARIABLE: job.replace(".0", ".1"), "RANK": "0"}
    with subprocess.Popen(["sleep", "60"], env=other) as neighbour, watch(job, tmp_path) as process:
        wait_for(tmp_path / "0.started", tmp_path / "1.started")
        process.stdin.close()
        process.wait(20)
        assert neighbour.poll() is None
        neighbour.kill()


def test_a_ranks_helper_is_no_rank(job, tmp_path):
    (tmp_path / "rank.sh").write_text("sleep 60 & echo $$ > $RANK.started; wait")
    with watch(job, tmp_path) as process:
        wait_for(tmp_path / "0.started", tmp_path / "1.started")
        found = {p.pid for p in ranks_among(processes_of(job))}
        assert found == {int((tmp_path / f"{rank}.started").read_text()) for rank in (0, 1)}
        process.kill()


def test_who_prints_after_the_reader_has_gone_lives_on_and_saves(job, tmp_path):
    (tmp_path / "rank.sh").write_text(RANK.replace("while :; do", "while :; do echo step || exit 9;"))
    with watch(job, tmp_path) as process:
        wait_for(tmp_path / "0.started", tmp_path / "1.started")
        process.stdout.close()
        process.stdin.close()
        assert process.wait(20) == 3
    assert (tmp_path / "0.saved").is_file() and (tmp_path / "1.saved").is_file()


def test_a_port_in_use_starts_nothing(job, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with watch(job, tmp_path, f"--port={port}", "bash", "-c", "echo > started") as process:
            assert process.wait(20) == 1
            assert f"port {port} is in use" in process.stderr.read()
    assert not (tmp_path / "started").exists()


def test_mpirun_is_stopped_by_its_own_signal(job, tmp_path):
    script = "trap 'exit 75' USR1; echo > started; while :; do sleep 0.05; done"
    with watch(job, tmp_path, "--stop-command-by=SIGUSR1", "bash", "-c", script) as process:
        wait_for(tmp_path / "started")
        process.stdin.write("stop\n")
        process.stdin.flush()
        assert process.wait(20) == 75
