"""A refused attempt leaves everything as it was, and a finished run says so; seen from whole `dsllm train` jobs."""

import json
import shutil
from pathlib import Path

import pytest

from dsllm.checkpoint.find import list_checkpoints
from dsllm.config.yaml_file import read_yaml
from dsllm.run_directory import LOCK_FILE, RUN_FILE, STATUS_FILE, lock_run, read_status, write_status
from tests.helpers.jobs import train
from tests.helpers.tiny_job import TOKENS_PER_STEP, budget, prepare_folder, tree

STEPS = 4
"""Length of the run that is there already."""
FORK = ["run.directory=runs/fork", "model.init_from=runs/tiny"]
NVME = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/no/such/disk"}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a finished run, one without a checkpoint, one with damaged checkpoints only, and bad inputs."""
    folder = prepare_folder(tmp_path_factory.mktemp("job"))
    runs = folder / "runs"
    shutil.rmtree(runs)
    codes, output = train(folder, 2, ["tiny.yaml", budget(STEPS)])
    assert codes == [0, 0], output
    shutil.copytree(runs / "tiny", runs / "damaged")
    for saved in list_checkpoints(runs / "damaged" / "checkpoints"):
        (saved / "manifest.json").write_text("{")
    (runs / "unsaved").mkdir()
    shutil.copy(runs / "tiny" / RUN_FILE, runs / "unsaved")
    shutil.copytree(runs / "tiny", runs / "newer")
    (runs / "newer" / STATUS_FILE).write_text('{"format_version": 99}')
    shutil.copytree(folder / "data" / "tiny", folder / "data" / "changed")
    with (folder / "data" / "changed" / "manifest.json").open("a") as file:
        file.write("\n")
    shutil.copytree(folder / "data" / "changed", folder / "data" / "altered")
    (folder / "data" / "changed" / "manifest.json.sha256").unlink()
    shutil.copytree(folder / "data" / "tiny", folder / "data" / "swapped")
    for file in (folder / "data" / "swapped").glob("train-golden-*.bin"):
        file.write_bytes(bytes(file.stat().st_size))  # ids stay valid, and are others
    (folder / "stage.json").write_text('{"zero_optimization": {"stage": 7}}')
    (folder / "cut.json").write_text("{")
    (folder / "nvme.json").write_text(json.dumps(NVME))
    return folder


REFUSED: dict[str, tuple[list[str], int, str]] = {
    "another run": (
        ["run.name=other", "run.directory=runs/tiny", "data.directory=data/tiny"], 1,
        "run.name: saved 'tiny', now 'other'",
    ),
    "another run without a checkpoint": (
        ["run.name=other", "run.directory=runs/unsaved", "data.directory=data/tiny"], 1,
        "belongs to the run 'tiny', not to 'other'",
    ),
    "a field that may not change": (["run.seed=12"], 1, "run.seed: saved 11, now 12"),
    "a wrong DeepSpeed JSON": (["deepspeed=stage.json"], 2, "zero_optimization"),
    "half a DeepSpeed JSON": (["deepspeed=cut.json"], 2, "cut.json"),
    "an unknown optimizer": (["train.optimizer.kind=muon"], 2, "train.optimizer.kind"),
    "tensor parallelism": (["parallel.tensor=2"], 2, "parallel.tensor: 2"),
    "kernels that are not here": (["train.kernels=liger"], 2, "train.kernels: liger, but this device (cpu)"),
    "no fp16 here": (["train.precision=fp16"], 2, "has no fp16"),
    "steps to profile that are over": (["--profile", "2:3"], 1, "takes the steps 5 to 24"),
    "data that differs": (["data.directory=data/changed"], 1, "data/changed: is not the data that"),
    "a data manifest that was altered": (
        ["data.directory=data/altered"], 1, "its SHA-256 is not the one in manifest.json.sha256",
    ),
    "shards that differ": (["data.directory=data/swapped"], 1, "the loaders deliver other samples for step 4"),
    "damaged checkpoints only": (["run.directory=runs/damaged"], 1, "none of the 1 checkpoints verifies"),
    "a status of a newer dsllm": (["run.directory=runs/newer"], 1, "has format version 99"),
    "init_from nowhere": ([FORK[0], "model.init_from=runs/nowhere"], 1, "runs/nowhere: no such folder"),
    "init_from another rope_theta": ([*FORK, "model.rope_theta=500000"], 1, "model.rope_theta: 10000.0 there"),
    "init_from another norm_epsilon": ([*FORK, "model.norm_epsilon=1e-6"], 1, "model.norm_epsilon: 1e-05 there"),
    "init_from another shape": ([*FORK, "model.mlp_size=64"], 1, "model.mlp_size: 96 there, 64 here"),
    "no disk to offload to": (["deepspeed=nvme.json", "model.num_layers=2"], 2, "no/such/disk: no such folder"),
}  # fmt: skip


QUICK = ("another run", "init_from another shape")
"""The others take two seconds each."""


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in REFUSED])
def test_a_refused_attempt_leaves_everything_as_it_was(folder, case):
    words, code, message = REFUSED[case]
    before = tree(folder / "runs", folder / "data")
    codes, output = train(folder, 2, ["tiny.yaml", budget(24), *words])
    assert codes == [code, code] and message in output and "Traceback" not in output, output
    assert tree(folder / "runs", folder / "data") == before


def test_a_live_run_is_left_alone(folder):
    lock = lock_run(folder / "runs" / "tiny", print)
    try:
        before = tree(folder / "runs", folder / "data")
        codes, output = train(folder, 2, ["tiny.yaml", budget(24)])
        assert codes == [1, 1] and output.count("a run is alive here (process") == 2, output
        assert tree(folder / "runs", folder / "data") == before
    finally:
        lock.release()


def test_a_finished_run_says_so_before_anything_is_built(folder):
    """Its optimizer could not be offloaded to a disk that is not there, but it does not need to be."""
    before = tree(folder / "runs", folder / "data")
    codes, output = train(folder, 2, ["tiny.yaml", budget(STEPS), "deepspeed=nvme.json"])
    assert codes == [0, 0] and f"is finished: {STEPS * TOKENS_PER_STEP:,} tokens" in output, output
    assert "ZeRO stage" not in output
    assert tree(folder / "runs", folder / "data") == before


@pytest.mark.parametrize("state", ["running", "interrupted"])
def test_a_run_that_was_killed_before_it_could_say_so_becomes_finished(folder, state):
    run = folder / "runs" / "tiny"
    write_status(run, state, attempt=3, step=STEPS - 1)
    before = tree(folder / "runs", folder / "data")
    codes, output = train(folder, 2, ["tiny.yaml", budget(STEPS)])
    assert codes == [0, 0] and "is finished" in output, output
    status = read_status(run)
    assert (status["state"], status["step"], status["tokens"]) == ("finished", STEPS, STEPS * TOKENS_PER_STEP)
    after = tree(folder / "runs", folder / "data")
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed == {str(run), str(run / STATUS_FILE), str(run / LOCK_FILE)}


@pytest.mark.slow
def test_auto_continues_in_the_precision_that_the_run_began_in(folder):
    """On the CPU auto means fp32_compute_bf16; on GPUs, where this run could have begun, it means bf16."""
    new = ["run.directory=runs/bf16", budget(STEPS)]
    codes, output = train(folder, 2, ["tiny.yaml", *new, "train.precision=bf16"])
    assert codes == [0, 0], output
    auto = ["run.directory=runs/bf16", budget(STEPS + 1), "train.precision=auto"]
    codes, output = train(folder, 2, ["tiny.yaml", *auto])
    assert codes == [0, 0] and "train.precision auto: continuing in bf16, as the run began" in output, output
    record = read_yaml(folder / "runs" / "bf16" / RUN_FILE)[0]
    assert record["train"]["precision"] == "bf16"


@pytest.mark.slow
def test_a_gpu_that_is_demanded_and_not_there(folder):
    before = tree(folder / "runs", folder / "data")
    codes, output = train(folder, 2, ["tiny.yaml", budget(24), "train.device=cuda"])
    assert codes == [1, 1] and "train.device: cuda, but torch sees no GPU here" in output, output
    assert "Traceback" not in output and tree(folder / "runs", folder / "data") == before
