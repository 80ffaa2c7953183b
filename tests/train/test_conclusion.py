"""The end of an attempt: its status is written first, and nothing that comes after changes it or the exit code."""

import json
import os
import signal
from pathlib import Path

import pytest

from dsllm.errors import EXIT_INTERRUPTED
from dsllm.run_directory import LOSS_PICTURE, METRICS_FILE, STATUS_FILE, TENSORBOARD, read_metrics, read_status
from tests.helpers.jobs import start_job, train
from tests.helpers.tiny_job import TOKENS_PER_STEP, budget

STEPS = 2


def in_the_way_of_the_picture(run: Path) -> None:
    (run / LOSS_PICTURE).mkdir(parents=True)


def in_the_way_of_tensorboard(run: Path) -> None:
    run.mkdir(parents=True)
    (run / TENSORBOARD).write_text("")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "words", "message"),
    [
        (in_the_way_of_the_picture, [], "the loss curve was not drawn: IsADirectoryError: "),
        (in_the_way_of_tensorboard, ["log.tensorboard=true"], "TensorBoard is switched off: "),
    ],
)
def test_a_picture_or_tracker_that_fails_changes_neither_exit_code_nor_status(folder, damage, words, message):
    damage(run := folder / "runs" / "tiny")
    codes, output = train(folder, 2, ["tiny.yaml", budget(STEPS), *words])
    assert codes == [0, 0] and output.count(message) == 1 and "Traceback" not in output, output
    status = read_status(run)
    assert (status["state"], status["step"], status["tokens"]) == ("finished", STEPS, STEPS * TOKENS_PER_STEP)
    assert f"trained {STEPS * TOKENS_PER_STEP:,} tokens" in output


@pytest.mark.slow
def test_odd_lines_in_the_metrics_are_skipped(folder):
    run = folder / "runs" / "tiny"
    run.mkdir(parents=True)
    odd = (
        b'[1]\n"step"\n{"tokens": 3}\nnull\n{}\n\xff\n{"step": "1"}\n{"step": 1, "loss": "x"}\n' + b"[" * 10**5 + b"\n"
    )
    (run / METRICS_FILE).write_bytes(odd)
    codes, output = train(folder, 2, ["tiny.yaml", budget(STEPS)])
    assert codes == [0, 0] and "not drawn" not in output, output
    assert (run / LOSS_PICTURE).is_file() and (run / METRICS_FILE).read_bytes().startswith(odd)
    assert [row["step"] for row in read_metrics(run)] == [1, 2]


@pytest.mark.slow
def test_the_status_is_written_before_the_picture(folder):
    """A pipe in the picture's place, which would wait for a reader, is replaced."""
    run = folder / "runs" / "tiny"
    run.mkdir(parents=True)
    os.mkfifo(run / LOSS_PICTURE)
    codes, output = train(folder, 2, ["tiny.yaml", budget(STEPS)])
    assert codes == [0, 0] and read_status(run)["state"] == "finished", output
    assert (run / LOSS_PICTURE).read_bytes().startswith(b"\x89PNG")
    assert (run / STATUS_FILE).stat().st_mtime_ns <= (run / LOSS_PICTURE).stat().st_mtime_ns


@pytest.mark.slow
def test_an_interrupted_run_says_by_what_and_where_it_stopped(folder):
    job = start_job(folder, 2, ["tiny.yaml", budget(5000), "checkpoint.every_steps=0", "train.validate_every_steps=0"])
    run = folder / "runs" / "tiny"
    job.wait_for_step(run / METRICS_FILE, 3)
    job.send(signal.SIGHUP, 1)  # a terminal that was closed, on the other host
    assert job.wait() == [EXIT_INTERRUPTED] * 2, job.output()
    status, last = read_status(run), read_metrics(run)[-1]
    assert (status["state"], status["step"], status["tokens"]) == ("interrupted", last["step"], last["tokens"])
    assert f"another rank received a signal: saved at step {last['step']}" in job.output()
    manifest = run / "checkpoints" / f"step-{last['step']:08d}" / "manifest.json"
    assert json.loads(manifest.read_text())["progress"]["step"] == last["step"]
