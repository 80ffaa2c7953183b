"""The loop does what is due at each step, in order, and resumes in the middle; tests/cli/test_train.py kills it."""

import json
import shutil
from pathlib import Path

import pytest

from dsllm.checkpoint.find import list_checkpoints
from dsllm.config.load import load_run
from dsllm.run_directory import LAYER_STATISTICS_FILE, read_metrics
from dsllm.train.loop import _due, step_seed
from dsllm.train.schedule import learning_rate_at
from tests.helpers.jobs import train
from tests.helpers.tiny_job import NUM_STEPS, TOKENS_PER_STEP, budget

WORDS = [
    "tiny.yaml", "train.validate_every_steps=6", "log.layer_statistics_every_steps=7", "checkpoint.every_steps=9",
    "checkpoint.keep_last=99",
]  # fmt: skip


def test_what_is_due():
    assert [step for step in range(1, 11) if _due(step, 3)] == [3, 6, 9]
    assert not any(_due(step, every) for step in range(1, 11) for every in (0, -1)), "never"


def test_runs_of_neighbouring_seeds_share_no_steps_dropout():
    seeds = [step_seed(run, step) for run in range(1234, 1244) for step in range(200)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(11, 0) == 42773730833367481, "a resumed run needs the same masks on every machine and version"


@pytest.fixture(scope="module")
def job(prepared, tmp_path_factory) -> tuple[Path, str]:
    """A run to its end on two ranks, and what it printed."""
    folder = tmp_path_factory.mktemp("loop") / "job"
    shutil.copytree(prepared, folder)
    codes, output = train(folder, 2, WORDS)
    assert codes == [0, 0], output
    return folder, output


def rows_of(folder: Path) -> list[dict]:
    return read_metrics(folder / "runs" / "tiny")


@pytest.mark.slow
def test_each_step_has_the_schedules_rate_and_the_next_tokens(job):
    folder, _ = job
    config = load_run(str(folder / "tiny.yaml"), [])
    rows = rows_of(folder)
    assert len(rows) == NUM_STEPS
    for step, row in enumerate(rows):
        assert row["learning_rate"] == learning_rate_at(step, config)
        assert row["tokens"] == (step + 1) * TOKENS_PER_STEP
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_what_is_due_happens_at_its_steps_and_at_the_last(job):
    folder, output = job
    run = folder / "runs" / "tiny"
    assert [row["step"] for row in rows_of(folder) if "validation_loss" in row] == [6, 12, 18, NUM_STEPS]
    lines = (run / LAYER_STATISTICS_FILE).read_text().splitlines()
    assert sorted({json.loads(line)["step"] for line in lines}) == [7, 14]
    saved = sorted(path.name for path in list_checkpoints(run / "checkpoints"))
    assert saved == [f"step-{step:08d}" for step in (9, 18, NUM_STEPS)]
    assert output.count("saved runs/tiny/checkpoints/") == 3
    # the step is shown before its checkpoint is
    assert output.index("step 18/20") < output.index("step-00000018") < output.index("step 20/20")


@pytest.mark.slow
def test_attempts_that_stop_anywhere_make_the_same_run(job, folder):
    """A shorter budget changes the schedule's end, so the schedule is constant; prefetch is on and off."""
    constant = ["train.schedule.shape=constant", "checkpoint.every_steps=3"]
    for steps, more in ((1, []), (8, ["data.prefetch=false"]), (NUM_STEPS, [])):
        codes, output = train(folder, 2, [*WORDS[:3], *constant, budget(steps), *more])
        assert codes == [0, 0], output
    shutil.copytree(folder, other := folder.parent / "whole", ignore=shutil.ignore_patterns("runs"))
    codes, output = train(other, 2, [*WORDS[:3], *constant])
    assert codes == [0, 0], output
    keys = ("step", "tokens", "loss", "gradient_norm", "learning_rate")
    assert [[row[key] for key in keys] for row in rows_of(folder)] == [
        [row[key] for key in keys] for row in rows_of(other)
    ]
    assert [row["attempt"] for row in rows_of(folder)] == [1] + [2] * 7 + [3] * 12
