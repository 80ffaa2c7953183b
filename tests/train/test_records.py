"""A run directory stands alone: what the run is, what it was trained on, and a row for every step."""

import json
import os
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
from dsllm.train.records import _copy_card
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("kind", ["link", "fifo", "/dev/zero", "folder", "half", "a list", "huge", "not UTF-8"])
def test_a_data_card_that_is_no_card_is_not_copied(tmp_path: Path, kind: str):
    """A foreign data folder might link to what nobody should publish with a run."""
    card, target, lines = tmp_path / "data_card.json", tmp_path / "run.json", []
    (tmp_path / "secret").write_text('{"key": 1}')
    if kind in ("link", "/dev/zero"):
        card.symlink_to(tmp_path / "secret" if kind == "link" else kind)
    elif kind == "fifo":
        os.mkfifo(card)
    elif kind == "folder":
        card.mkdir()
    else:
        card.write_bytes({"half": b'{"sour', "a list": b"[1]", "huge": b"{}", "not UTF-8": b'{"\xff": 1}'}[kind])
        os.truncate(card, 2**40 if kind == "huge" else card.stat().st_size)
    _copy_card(card, target, lines.append)
    assert not target.exists() and len(lines) == 1 and str(card) in lines[0]


def test_a_data_card_is_copied_over_a_link(tmp_path: Path):
    card, target, lines = tmp_path / "data_card.json", tmp_path / "run.json", []
    _copy_card(card, target, lines.append)
    assert not target.exists() and lines == [], "data need not have one"
    card.write_text('{"a": 1}')
    (tmp_path / "mine").write_text("mine")
    target.symlink_to(tmp_path / "mine")
    _copy_card(card, target, lines.append)
    assert target.read_text() == '{"a": 1}' and (tmp_path / "mine").read_text() == "mine" and lines == []
