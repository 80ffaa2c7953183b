"""dsllm train on real ranks: resume to the last bit, interrupts, kills, damage, and everything that is refused."""

import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsllm.checkpoint.find import list_checkpoints
from dsllm.errors import EXIT_INTERRUPTED
from dsllm.train.picture import read_metrics
from tests.helpers.jobs import start_job, train
from tests.helpers.tiny_job import NUM_STEPS

"""ZeRO stages: the hardest one in the everyday tests, all of them in `make test`."""


def metrics(folder: Path) -> list[dict]:
    return read_metrics(folder / "runs" / "tiny")


def curve(folder: Path) -> list[tuple]:
    """All that must be equal between two runs, step by step."""
    keys = ("step", "tokens", "loss", "gradient_norm", "learning_rate", "validation_loss")
    return [tuple(row.get(key) for key in keys) for row in metrics(folder)]


def status(folder: Path) -> dict:
    return json.loads((folder / "runs" / "tiny" / "status.json").read_text())


def checkpoints(folder: Path) -> list[Path]:
    return list_checkpoints(folder / "runs" / "tiny" / "checkpoints")


def zero(stage: int) -> str:
    return f"deepspeed=ds_configs/zero{stage}.json"


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory) -> Callable[[int], list[tuple]]:
    """The curve of a run on 2 ranks that nothing disturbed, by ZeRO stage."""

    @cache
    def curve_of(stage: int) -> list[tuple]:
        folder = tmp_path_factory.mktemp("whole") / "job"
        shutil.copytree(prepared, folder)
        codes, output = train(folder, 2, ["tiny.yaml", zero(stage)])
        assert codes == [0, 0], output
        assert status(folder)["state"] == "finished"
        rows = curve(folder)
        assert [row[0] for row in rows] == list(range(1, NUM_STEPS + 1))
        assert rows[-1][2] < rows[0][2]
        return rows

    return curve_of


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_killed_at_a_random_step_it_continues_to_the_last_bit(uninterrupted, folder, stage):
    step = random.Random(os.getpid() + stage).randrange(5, NUM_STEPS - 1)
    job = start_job(folder, 2, ["tiny.yaml", zero(stage)])
    job.wait_for_step(folder / "runs" / "tiny" / "metrics.jsonl", step)
    job.kill()
    assert checkpoints(folder)
    codes, output = train(folder, 2, ["tiny.yaml", zero(stage), "data.prefetch=false"])
    assert codes == [0, 0], output
    assert "resuming" in output
    assert curve(folder) == uninterrupted(stage), f"killed at step {step}"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others_in_words(folder, rank):
    job = start_job(folder, 2, ["tiny.yaml", f"train.total_tokens={5000 * 8 * 32}"])
    job.wait_for_step(folder / "runs" / "tiny" / "metrics.jsonl", 5)
    job.send(signal.SIGKILL, rank)
    codes = job.wait(30)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
    assert f"error: rank {1 - rank} of 2 lost another rank" in job.output() and "Traceback" not in job.output()
    assert status(folder)["state"] == ("running" if rank == 0 else "failed")  # only rank 0 could have said so


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_saves_on_all_and_exits_75(uninterrupted, folder, number, rank):
    job = start_job(folder, 2, ["tiny.yaml", zero(2), "checkpoint.every_steps=0"])
    job.wait_for_step(folder / "runs" / "tiny" / "metrics.jsonl", 5)
    job.send(number, rank)
    assert job.wait() == [EXIT_INTERRUPTED] * 2, job.output()
    assert status(folder)["state"] == "interrupted"
    (saved,) = checkpoints(folder)
    assert int(saved.name.removeprefix("step-")) == len(metrics(folder)) < NUM_STEPS
    codes, output = train(folder, 2, ["tiny.yaml", zero(2)])
    assert codes == [0, 0], output
    assert curve(folder) == uninterrupted(2)


@pytest.mark.slow
def test_another_layout_continues_with_the_same_samples_and_losses(uninterrupted, folder):
    """Two ranks at stage 3, then one at stage 0, then two at stage 1 with another micro-batch."""
    for world_size, stage, steps, more in (
        (2, 3, 8, []),
        (1, 0, 14, []),
        (2, 1, 20, ["train.micro_batch_sequences=4"]),
    ):
        budget = f"train.total_tokens={steps * 8 * 32}"
        codes, output = train(folder, world_size, ["tiny.yaml", zero(stage), budget, "model.dropout=0", *more])
        assert codes == [0] * world_size, output
    # dropout's randomness belongs to a rank, so it is off; the budget moves the schedule's end: only the order is compared
    fingerprints = json.loads((checkpoints(folder)[0] / "manifest.json").read_text())["progress"]["fingerprint"]
    codes, output = train(folder, 1, ["tiny.yaml", "run.directory=runs/whole", "model.dropout=0"])
    assert codes == [0], output
    whole = list_checkpoints(folder / "runs" / "whole" / "checkpoints")[0]
    assert json.loads((whole / "manifest.json").read_text())["progress"]["fingerprint"] == fingerprints


def test_a_finished_run_says_so_and_a_larger_budget_continues(folder):
    train(folder, 1, ["tiny.yaml"])
    codes, output = train(folder, 1, ["tiny.yaml"])
    assert codes == [0] and "is finished" in output
    assert status(folder)["state"] == "finished" and status(folder)["step"] == NUM_STEPS
    codes, output = train(folder, 1, ["tiny.yaml", f"train.total_tokens={24 * 8 * 32}"])
    assert codes == [0] and "changed since the last attempt: train.total_tokens" in output
    assert metrics(folder)[-1]["step"] == 24


def test_retention(folder):
    train(folder, 1, ["tiny.yaml", "checkpoint.keep_last=2", "checkpoint.keep_every_steps=8"])
    assert [p.name for p in checkpoints(folder)] == ["step-00000020", "step-00000016", "step-00000008"]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped_and_removed_after_the_next_save(folder):
    codes, _ = train(folder, 2, ["tiny.yaml", zero(1), f"train.total_tokens={8 * 8 * 32}"])
    assert codes == [0, 0]
    newest, older = checkpoints(folder)
    file = newest / "optimizer-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    # the next save is a step before the damaged one's, and only one checkpoint is kept
    budget = f"train.total_tokens={7 * 8 * 32}"
    for leftover in (".step-00000001.removing", ".step-00000002.partial"):
        (newest.parent / leftover).mkdir()
    codes, output = train(folder, 2, ["tiny.yaml", zero(1), budget, "checkpoint.keep_last=1"])
    assert codes == [0, 0], output
    assert f"{newest.name} is damaged and skipped" in output and f"resuming {older.relative_to(folder)}" in output
    assert [p.name for p in newest.parent.iterdir()] == ["step-00000007"]
    codes, output = train(folder, 2, ["tiny.yaml", zero(1)])
    assert codes == [0, 0] and "step-00000007: step 7" in output, output
    assert metrics(folder)[-1]["step"] == NUM_STEPS


@pytest.mark.slow
def test_all_checkpoints_damaged(folder):
    train(folder, 1, ["tiny.yaml"])
    for saved in checkpoints(folder):
        (saved / "manifest.json").write_text("{")
    codes, output = train(folder, 1, ["tiny.yaml"])
    assert codes == [1] and "none of the 2 checkpoints verifies" in output


@pytest.mark.slow
def test_a_run_that_differs_is_refused_with_the_difference(folder):
    train(folder, 1, ["tiny.yaml"])
    codes, output = train(folder, 1, ["tiny.yaml", "train.optimizer.learning_rate=5e-4", "run.seed=3"])
    assert codes == [1]
    assert "train.optimizer.learning_rate: saved 0.001, now 0.0005" in output and "run.seed: saved 11, now 3" in output
    assert "model.init_from=" in output
    fork = ["tiny.yaml", "run.seed=3", "run.directory=runs/fork", f"model.init_from={checkpoints(folder)[0]}"]
    codes, output = train(folder, 1, fork)
    assert codes == [0] and "starting from the weights of" in output, output
    assert read_metrics(folder / "runs" / "fork")[0]["loss"] < metrics(folder)[0]["loss"] - 0.3


@pytest.mark.slow
def test_init_from_another_shape_is_refused(folder):
    train(folder, 1, ["tiny.yaml"])
    wrong = ["tiny.yaml", "run.directory=runs/other", "model.init_from=runs/tiny", "model.mlp_size=64"]
    codes, output = train(folder, 1, wrong)
    assert codes == [1] and "model.mlp_size: 96 there, 64 here" in output


@pytest.mark.slow
def test_init_from_another_function_of_the_same_shape_is_refused(folder):
    """Every matrix fits, and each of these would be another model: all of them are named."""
    train(folder, 1, ["tiny.yaml"])
    changes = ["model.rope_theta=500000", "model.norm_epsilon=1e-6", "model.num_heads=2", "model.num_kv_heads=1"]
    codes, output = train(folder, 1, ["tiny.yaml", "run.directory=runs/other", "model.init_from=runs/tiny", *changes])
    assert codes == [1] and "is another model" in output
    for line in (
        "model.rope_theta: 10000.0 there, 500000.0 here",
        "model.norm_epsilon: 1e-05 there, 1e-06 here",
        "model.num_heads: 4 there, 2 here",
    ):
        assert line in output, output
    assert ".weight:" not in output


@pytest.mark.slow
def test_weights_alone_start_a_run_but_do_not_resume_one(folder):
    train(folder, 2, ["tiny.yaml", "checkpoint.keep_last=1"])
    (newest,) = checkpoints(folder)
    for file in newest.glob("optimizer-*"):
        file.unlink()
    budget = f"train.total_tokens={24 * 8 * 32}"
    codes, output = train(folder, 2, ["tiny.yaml", budget])
    assert codes == [1, 1] and "optimizer-00000.safetensors: cannot be read" in output
    assert "none of the 1 checkpoints verifies" in output and newest.is_dir()
    codes, output = train(folder, 2, ["tiny.yaml", "run.directory=runs/fork", "model.init_from=runs/tiny"])
    assert codes == [0, 0] and f"starting from the weights of {newest.parents[1].relative_to(folder)}" in output, output


@pytest.mark.slow
def test_another_runs_directory_is_refused(folder):
    train(folder, 1, ["tiny.yaml"])
    codes, output = train(
        folder, 1, ["tiny.yaml", "run.name=other", "run.directory=runs/tiny", "data.directory=data/tiny"]
    )
    assert codes == [1] and "run.name: saved 'tiny', now 'other'" in output


@pytest.mark.slow
def test_a_directory_in_which_a_run_is_alive_is_refused(folder):
    job = start_job(folder, 1, ["tiny.yaml", f"train.total_tokens={2000 * 8 * 32}", "checkpoint.every_steps=0"])
    job.wait_for_step(folder / "runs" / "tiny" / "metrics.jsonl", 1)
    (folder / "second").mkdir()
    os.symlink(folder / "runs", folder / "second" / "runs")
    os.symlink(folder / "data", folder / "second" / "data")
    codes, output = train(folder / "second", 2, [str(folder / "tiny.yaml")])
    assert codes == [1, 1] and "a run is alive here (process" in output
    job.kill()
    codes, output = train(folder, 1, ["tiny.yaml"])  # a kill leaves no lock behind
    assert codes == [0], output


@pytest.mark.slow
def test_disk_full_while_saving(folder):
    """A file size limit stands in for a full disk: the write fails on one rank after the file has begun."""
    codes, output = train(folder, 2, ["tiny.yaml", f"train.total_tokens={4 * 8 * 32}"])
    assert codes == [0, 0], output
    before = [p.name for p in checkpoints(folder)]
    for saved in (folder / "runs" / "tiny" / "checkpoints").iterdir():
        saved.chmod(0o700)
    job = start_job(folder, 2, ["tiny.yaml"], file_size_limit=20_000)
    assert job.wait() == [1, 1], job.output()
    assert "cannot be written: File too large" in job.output() and "GiB are free" in job.output()
    assert [p.name for p in (folder / "runs" / "tiny" / "checkpoints").iterdir()] == before
    assert status(folder)["state"] == "failed"
    codes, output = train(folder, 2, ["tiny.yaml"])
    assert codes == [0, 0], output


def test_batch_that_does_not_divide(folder):
    codes, output = train(folder, 2, ["tiny.yaml", "train.micro_batch_sequences=3"])
    assert codes == [2, 2]
    assert "8 is not divisible by micro-batch 3 x 2 ranks = 6: use train.global_batch_sequences 6 or 12" in output
    assert "micro_batch_sequences 2 or 4" in output and not (folder / "runs").exists()


def test_vocabulary_larger_than_the_models(folder):
    codes, output = train(folder, 1, ["tiny.yaml", "model.vocab_size=299"])
    assert codes == [2] and "model.vocab_size 299 is smaller than the 300 ids of the tokenizer" in output


def test_tokenizer_that_does_not_match_the_shards(folder):
    file = folder / "data" / "tiny" / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"the"', '"teh"', 1) + "\n")
    codes, output = train(folder, 1, ["tiny.yaml"])
    assert codes == [1] and "tokenizer" in output and "Traceback" not in output


@pytest.mark.parametrize("split", ["train", "validation"])
def test_truncated_shard(folder, split):
    """Each of the two shards is checked by one of the ranks, and both ranks end."""
    file = next((folder / "data" / "tiny").glob(f"{split}-golden-*.bin"))
    os.truncate(file, file.stat().st_size - 2)
    codes, output = train(folder, 2, ["tiny.yaml"])
    assert codes == [1, 1] and "Traceback" not in output
    assert f"{file.name}: {file.stat().st_size} bytes, but" in output
    assert not (folder / "runs").exists(), "the refused attempt leaves no trace"


def test_corpus_shorter_than_one_sequence(folder):
    codes, output = train(folder, 1, ["tiny.yaml", "data.sequence_length=50000"])
    assert codes == [1] and "sequence" in output and "Traceback" not in output


@pytest.mark.slow
def test_other_data_settings_are_refused(folder):
    codes, output = train(folder, 1, ["tiny.yaml", "tokenizer.vocab_size=320"])
    assert codes == [1] and "was prepared with other settings:\n  tokenizer." in output


def test_shards_that_changed_under_a_run_are_refused(folder):
    train(folder, 1, ["tiny.yaml", f"train.total_tokens={4 * 8 * 32}"])
    for file in (folder / "data" / "tiny").glob("train-golden-*.bin"):
        content = bytearray(file.read_bytes())
        content[::2] = bytes(len(content[::2]))  # ids stay valid, and all are other ones
        content[1::2] = bytes(len(content[1::2]))
        file.write_bytes(content)
    codes, output = train(folder, 1, ["tiny.yaml"])
    assert codes == [1] and "the loaders deliver other samples for step 4" in output


def test_empty_corpus(folder):
    shutil.rmtree(folder / "data")
    for file in (folder / "corpus").iterdir():
        file.write_text("")
    codes, output = train(folder, 1, ["tiny.yaml"])
    assert codes == [1] and "Traceback" not in output, output


def test_fp16_on_cpu_is_refused_in_words(folder):
    codes, output = train(folder, 1, ["tiny.yaml", "train.precision=fp16"])
    assert codes == [2] and "this accelerator (cpu) has no fp16" in output


@pytest.mark.slow
def test_saving_by_the_clock_and_tensorboard(folder):
    """A save is due when the minutes have passed: with almost none, after every step."""
    codes, output = train(
        folder, 2, ["tiny.yaml", "checkpoint.every_minutes=1e-6", "log.tensorboard=true", "checkpoint.keep_last=99"]
    )
    assert codes == [0, 0], output
    assert len(checkpoints(folder)) == NUM_STEPS
    (events,) = (folder / "runs" / "tiny" / "tensorboard").iterdir()
    board = EventAccumulator(str(events)).Reload()
    assert [e.step for e in board.Scalars("loss")] == list(range(1, NUM_STEPS + 1))
    assert [e.value for e in board.Scalars("loss")] == pytest.approx([row["loss"] for row in metrics(folder)])


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_activation_checkpointing_under_zero(uninterrupted, folder, stage):
    """With dropout: recomputation replays the same randomness."""
    codes, output = train(folder, 2, ["tiny.yaml", zero(stage), "train.activation_checkpointing=full"])
    assert codes == [0, 0], output
    assert curve(folder) == uninterrupted(stage)


PARTS = ("data", "forward", "backward", "communication", "optimizer")


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_looking_inside_changes_nothing(uninterrupted, folder, stage):
    """A profile and layer statistics, with two micro-batches a step on two ranks."""
    arguments = ["--profile", "tiny.yaml", zero(stage), "log.layer_statistics_every_steps=10", "log.tensorboard=true"]
    codes, output = train(folder, 2, arguments)
    assert codes == [0, 0], output
    assert curve(folder) == uninterrupted(stage)

    for rank in range(2):
        trace = folder / "runs" / "tiny" / "profile" / f"steps-5-7-rank-{rank}.pt.trace.json"
        names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"] if event.get("ph") == "X"]
        assert [names.count(part) for part in ("data", "forward", "backward", "optimizer")] == [3, 6, 6, 6]
        assert names.count("communication") > 3 and "aten::mm" in names
    assert "profile of rank 0, steps 5 to 7" in output and "CPU time of its own" in output
    assert "counted in step 4, for this rank" in output and "by formula" in output

    for row in metrics(folder):
        assert sum(row[f"{part}_seconds"] for part in (*PARTS, "other")) == pytest.approx(row["seconds"])
        assert all(row[f"{part}_seconds"] > 0 for part in PARTS)
    assert "part of a step" in output and "on rank 1" in output

    lines = (folder / "runs" / "tiny" / "layer_statistics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    layers = ["embed", "layers.0", "layers.1", "norm", "head"]
    assert [(row["step"], row["layer"]) for row in rows] == [(step, layer) for step in (10, 20) for layer in layers]
    for step in (10, 20):
        norm = math.hypot(*(row["gradient_norm"] for row in rows if row["step"] == step))
        assert norm == pytest.approx(metrics(folder)[step - 1]["gradient_norm"], rel=1e-5)
    (events,) = (folder / "runs" / "tiny" / "tensorboard").iterdir()
    assert [e.step for e in EventAccumulator(str(events)).Reload().Scalars("gradient_norm/layers.1")] == [10, 20]


@pytest.mark.slow
def test_a_resumed_run_is_profiled_by_its_own_steps(folder):
    codes, output = train(folder, 1, ["tiny.yaml", f"train.total_tokens={4 * 8 * 32}"])
    assert codes == [0], output
    arguments = ["tiny.yaml", f"train.total_tokens={8 * 8 * 32}", "log.breakdown=false"]
    codes, output = train(folder, 1, [*arguments, "--profile"])
    assert codes == [1] and "--profile 9:11: this attempt takes the steps 5 to 8" in output, output
    codes, output = train(folder, 1, [*arguments, "--profile", "6:7"])
    assert codes == [0], output
    assert (folder / "runs" / "tiny" / "profile" / "steps-6-7-rank-0.pt.trace.json").is_file()
    assert "forward_seconds" not in metrics(folder)[-1] and "part of a step" not in output


@pytest.mark.slow
def test_a_run_that_does_not_recover_says_which_module_and_which_batch(folder):
    """Weights of 1e18 after the first step: products of a few of them are not finite."""
    budget = f"train.total_tokens={80 * 8 * 32}"
    codes, output = train(
        folder, 2, ["tiny.yaml", budget, "train.optimizer.learning_rate=1e18", "train.schedule.warmup_steps=0"]
    )
    assert codes == [1, 1], output
    status = json.loads((folder / "runs" / "tiny" / "status.json").read_text())
    assert "the gradients of 50 steps in a row were not finite" in status["reason"]
    assert " pass of micro-batch 0 on rank 0 (and on 1 other ranks) (samples " in status["reason"]
    assert "of the run, from golden" in status["reason"]
