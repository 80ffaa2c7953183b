"""dsllm train that is asked to stop before its first step, forced to end, or robbed of its disk or directory."""

import importlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dsllm.checkpoint.find import list_checkpoints, looks_sound
from dsllm.errors import EXIT_FORCED, EXIT_INTERRUPTED
from dsllm.run_directory import CHECKPOINTS, METRICS_FILE, STATUS_FILE, read_metrics, read_status, write_status
from tests.helpers.jobs import start_job, train
from tests.helpers.tiny_job import budget, tree

ENDLESS = [budget(5000), "train.validate_every_steps=0", "train.schedule.shape=constant"]


def at(module: str, name: str, act: Callable[[], object]) -> None:
    """Let this process do something when it calls a function of dsllm, and then call it."""
    plain = getattr(importlib.import_module(module), name)

    def call(*arguments: Any, **options: Any) -> Any:
        act()
        return plain(*arguments, **options)

    setattr(importlib.import_module(module), name, call)


def signal_at(module: str, name: str, number: signal.Signals) -> None:
    at(module, name, lambda: os.kill(os.getpid(), number))


BEFORE_THE_FIRST_STEP = {
    "data": ("dsllm.cli.prepared_data", "load_manifest", False),
    "checkpoints": ("dsllm.session.open", "find_start", False),
    "engine": ("dsllm.session.open", "ready_engine", True),
    "records": ("dsllm.train.records", "_write_facts", True),
}
"""Where the signal comes, and whether the directory is held by then."""


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("moment", BEFORE_THE_FIRST_STEP)
def test_a_signal_before_the_first_step_stops_all_ranks_and_saves_nothing(folder, moment, num_ranks):
    module, name, held = BEFORE_THE_FIRST_STEP[moment]
    rank = 0 if moment == "records" else num_ranks - 1
    planted = {rank: partial(signal_at, module, name, signal.SIGTERM)}
    job = start_job(folder, num_ranks, ["tiny.yaml", *ENDLESS], planted=planted)
    assert job.wait() == [EXIT_INTERRUPTED] * num_ranks, job.output()
    assert "stopped before the first step, nothing was saved" in job.output() and "Traceback" not in job.output()
    run = folder / "runs" / "tiny"
    assert (list_checkpoints(run / CHECKPOINTS) == [] and not (run / METRICS_FILE).is_file()) or not read_metrics(run)
    assert read_status(run).get("state") == ("interrupted" if held else None)
    codes, output = train(folder, num_ranks, ["tiny.yaml", budget(1)])
    assert codes == [0] * num_ranks, output


@pytest.mark.slow
def test_a_signal_to_a_run_that_resumes_leaves_its_state_and_a_true_status(folder):
    codes, output = train(folder, 1, ["tiny.yaml", budget(4), *ENDLESS[1:]])
    assert codes == [0], output
    run = folder / "runs" / "tiny"
    write_status(run, "running", attempt=1, step=4)  # as kill -9 leaves it
    before = tree(run / CHECKPOINTS)
    for module, name, held in (BEFORE_THE_FIRST_STEP["checkpoints"], BEFORE_THE_FIRST_STEP["engine"]):
        planted = {0: partial(signal_at, module, name, signal.SIGHUP)}
        job = start_job(folder, 1, ["tiny.yaml", *ENDLESS], planted=planted)
        assert job.wait() == [EXIT_INTERRUPTED], job.output()
        status = read_status(run)
        assert (status["state"], status["step"], status["attempt"]) == ("interrupted", 4, 2 if held else 1)
        assert status["reason"] == "SIGHUP, before the first step" and tree(run / CHECKPOINTS) == before


@pytest.mark.slow
def test_a_signal_while_the_data_is_prepared(folder):
    shutil.rmtree(folder / "data")
    planted = {0: partial(signal_at, "dsllm.prepare.pipeline", "write_shards", signal.SIGTERM)}
    job = start_job(folder, 1, ["tiny.yaml", budget(1)], planted=planted)
    assert job.wait() == [EXIT_INTERRUPTED], job.output()
    assert "SIGTERM: stopped before the first step" in job.output() and "leaked" not in job.output()
    codes, output = train(folder, 1, ["tiny.yaml", budget(1)])
    assert codes == [0], output


@pytest.mark.slow
def test_a_second_ctrl_c_ends_all_at_once_and_checkpoints_stay(folder):
    job = start_job(folder, 2, ["tiny.yaml", *ENDLESS, "checkpoint.every_steps=2"])
    run = folder / "runs" / "tiny"
    job.wait_for_step(run / METRICS_FILE, 5)
    os.kill(job.processes[1].pid, signal.SIGSTOP)  # so that no step ends any more
    time.sleep(0.3)
    checkpoints = [p for p in list_checkpoints(run / CHECKPOINTS) if looks_sound(p)]
    job.send(signal.SIGINT, 0)
    deadline = time.monotonic() + 20
    while "stops after this step and saves; a second Ctrl-C" not in job.output():
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.05)
    time.sleep(0.3)
    job.send(signal.SIGINT, 0)
    job.processes[0].join(20)
    assert job.processes[0].exitcode == EXIT_FORCED, job.output()
    job.kill()
    assert read_status(run)["reason"] == "ended at once by a second SIGINT"
    assert checkpoints and all(looks_sound(p) for p in checkpoints)
    codes, output = train(folder, 2, ["tiny.yaml", *ENDLESS[1:], budget(8), "checkpoint.every_steps=2"])
    assert codes == [0, 0], output


@pytest.fixture
def small_disk(folder):
    """A run directory on a disk of 4 MB."""
    run = folder / "runs" / "tiny"
    run.mkdir(parents=True)
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", run], check=False).returncode
    ):
        pytest.skip("a small disk needs root and mounts")
    yield run
    subprocess.run(["umount", "-l", run], check=True)


def fill(run: Path) -> None:
    """Leave no room on the run's disk."""
    with (run / "fill").open("ab", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


def fill_at_step(run: Path, step: int, free_at: int | None) -> None:
    """Fill the disk before a step, and make room again before another one."""
    count = [0]

    def act() -> None:
        count[0] += 1
        if count[0] == step:
            fill(run)
        if count[0] == free_at:
            (run / "fill").unlink()

    at("dsllm.train.loop", "take_step", act)


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_nothing(folder, small_disk):
    planted = {0: partial(fill_at_step, small_disk, 6, 9)}
    words = ["tiny.yaml", budget(12), *ENDLESS[1:], "checkpoint.every_steps=4", "checkpoint.every_steps=10"]
    job = start_job(folder, 2, words, planted=planted)
    assert job.wait() == [0, 0], job.output()
    assert "its rows wait in memory: No space left on device" in job.output() and "can be written again" in job.output()
    assert [row["step"] for row in read_metrics(small_disk)] == list(range(1, 13))
    assert read_status(small_disk)["state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("board", ["false", "true"])
def test_a_disk_that_stays_full_ends_the_run_in_words_and_old_checkpoints_stay(folder, small_disk, board):
    planted = {0: partial(fill_at_step, small_disk, 6, None)}
    words = ["tiny.yaml", *ENDLESS, "checkpoint.every_steps=4", f"log.tensorboard={board}"]
    job = start_job(folder, 2, words, planted=planted)
    assert job.wait() == [1, 1], job.output()
    output = job.output()
    assert "the run's state could not be saved: " in output and "No space left on device" in output, output
    assert "Traceback" not in output, output
    status = read_status(small_disk)
    assert (status["state"], status["step"], status["checkpoint"]) == ("failed", 4, "step-00000004")
    assert "could not be saved" in status["reason"]
    (saved,) = list_checkpoints(small_disk / CHECKPOINTS)
    assert looks_sound(saved) and sorted(p.name for p in saved.parent.iterdir()) == [saved.name]
    (small_disk / "fill").unlink()
    codes, output = train(folder, 2, ["tiny.yaml", budget(8), *words[2:]])
    assert codes == [0, 0] and "resuming" in output, output


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_start_is_an_error_in_words(folder, small_disk):
    fill(small_disk)
    codes, output = train(folder, 2, ["tiny.yaml", budget(1)])
    assert codes == [1, 1] and "No space left on device" in output and "Traceback" not in output, output


def lose(run: Path, what: str) -> None:
    if what == "lock":
        (run / "lock").unlink()
    else:
        run.rename(run.with_name("elsewhere"))


def lose_at_step(run: Path, what: str, step: int) -> None:
    count = [0]

    def act() -> None:
        count[0] += 1
        if count[0] == step:
            lose(run, what)

    at("dsllm.train.loop", "take_step", act)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["lock", "directory"])
def test_a_directory_that_is_removed_under_a_run_is_made_and_locked_again(folder, what):
    run = folder / "runs" / "tiny"
    planted = {0: partial(lose_at_step, run, what, 5)}
    job = start_job(folder, 2, ["tiny.yaml", budget(12), *ENDLESS[1:]], planted=planted)
    assert job.wait() == [0, 0], job.output()
    assert "its lock was removed while the run was alive; it is locked again" in job.output()
    assert read_status(run)["state"] == "finished" and (run / STATUS_FILE).is_file()
    assert [row["step"] for row in read_metrics(run)][-1] == 12
    codes, output = train(folder, 2, ["tiny.yaml", budget(16), *ENDLESS[1:]])
    assert codes == [0, 0] and "step-00000012: step 12" in output, output
