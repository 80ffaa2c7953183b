"""A run directory stands alone: what the run is, what it was trained on, and a row for every step."""

import json
import shutil
from pathlib import Path

import pytest

from dsllm.checkpoint.find import list_checkpoints
from dsllm.checkpoint.read import CheckpointReader
from dsllm.config.load import load_run
from dsllm.engine.settings.final_config import final_config
from dsllm.engine.settings.layout import Layout
from dsllm.mesh import Mesh
from dsllm.run_directory import (
    DATA_CARD_FILE,
    DEEPSPEED_FILE,
    METRICS_FILE,
    RUN_FILE,
    TOKENIZER,
    read_metrics,
    read_status,
)
from dsllm.session.resume import saved_run
from tests.helpers.jobs import train
from tests.helpers.tiny_job import NUM_STEPS, TOKENS_PER_STEP, budget


@pytest.fixture(scope="module")
def job(prepared, tmp_path_factory) -> tuple[Path, str]:
    """A run to its end on two ranks, and what it printed."""
    folder = tmp_path_factory.mktemp("records") / "job"
    shutil.copytree(prepared, folder)
    codes, output = train(folder, 2, ["tiny.yaml", "train.precision=auto", "log.layer_statistics_every_steps=8"])
    assert codes == [0, 0], output
    return folder, output


def test_the_directory_says_what_was_run_and_on_what(job):
    folder, _ = job
    run, data = folder / "runs" / "tiny", folder / "data" / "tiny"
    saved = saved_run(CheckpointReader(list_checkpoints(run / "checkpoints")[0]))
    written = load_run(str(run / RUN_FILE), [])
    assert written == saved, "the directory's own YAML starts the same run"
    assert written.train.precision == "fp32_compute_bf16", "not auto, which would be another one elsewhere"
    assert written.model.vocab_size == 300
    layout = Layout(mesh=Mesh(data=2), device="cpu", precision="fp32_compute_bf16")
    given = json.loads(Path("ds_configs/zero1.json").read_text())
    assert json.loads((run / DEEPSPEED_FILE).read_text()) == final_config(saved, given, layout)
    assert (run / DATA_CARD_FILE).read_bytes() == (data / DATA_CARD_FILE).read_bytes()
    for file in (data / TOKENIZER).iterdir():
        assert (run / TOKENIZER / file.name).read_bytes() == file.read_bytes()


def test_there_is_a_row_for_every_step_and_its_parts_add_up(job):
    rows = read_metrics(job[0] / "runs" / "tiny")
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    for row in rows:
        parts = sum(value for key, value in row.items() if key.endswith("_seconds") and key != "eta_seconds")
        assert parts == pytest.approx(row["seconds"]) and row["attempt"] == 1
        assert row["tokens_per_second"] == pytest.approx(TOKENS_PER_STEP / row["seconds"])
        assert ("validation_loss" in row) == (row["step"] in (10, NUM_STEPS))


def test_the_terminal_shows_some_steps_and_what_is_about_to_run(job):
    _, output = job
    lines = output.splitlines()
    shown = [int(line.split()[1].partition("/")[0]) for line in lines if line.startswith("step ")]
    assert shown == [1, 5, 10, 15, 20]
    (first,) = [line for line in lines if line.startswith("tiny: ")]
    assert "2 ranks on cpu" in first and first.endswith("ZeRO stage 1, fp32_compute_bf16")
    (second,) = [line for line in lines if "tokens a step" in line]
    assert second.startswith("256 tokens a step (2 micro-batches of 2 x 32 on each rank), 20 steps; MFU against ")
    assert sum(line.startswith("part of a step") for line in lines) == 1


@pytest.mark.parametrize("name", [METRICS_FILE, DEEPSPEED_FILE, TOKENIZER])
def test_a_directory_that_cannot_be_written_is_an_error_in_words_on_all_ranks(folder, name):
    """What stands in the way of a file is a folder, and of a folder a file: root may write everything else."""
    run = folder / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / name).write_text("") if name == TOKENIZER else (run / name).mkdir()
    codes, output = train(folder, 2, ["tiny.yaml", budget(2)])
    assert codes == [1, 1] and "Traceback" not in output, output
    assert output.count("error: run.directory runs/tiny: cannot be written: ") == 2 and name in output
    status = read_status(run)
    assert status["state"] == "failed" and "cannot be written" in status["reason"]
