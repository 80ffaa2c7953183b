"""SLURM runs the shipped batch script as it is: to the run's end, over its time limit, and to a failure that is reported."""

import re
import signal
import time
from pathlib import Path

import pytest
import yaml

from tests.cluster.hosts import NODES
from tests.helpers import jobs
from tests.helpers.launched import (
    BIN,
    ENDLESS,
    EXACT,
    FAULTY,
    ROOT,
    budget,
    copy_of,
    fingerprint,
    losses,
    num_steps,
    rank_process,
    seconds_until_gone,
    status,
    wait_for,
)

pytestmark = pytest.mark.long

SCRIPT = str(ROOT / "launch" / "slurm" / "multi_node.sbatch")


def submit(slurm, folder: Path, *overrides: str, options: tuple[str, ...] = (), **variables: str) -> str:
    """Submit the script for the tiny run; the job's number."""
    exported = ",".join(["ALL", f"VENV={BIN.parent}", "OMP_NUM_THREADS=1", *(f"{k}={v}" for k, v in variables.items())])
    words = ["sbatch", "--parsable", f"--export={exported}", *options, SCRIPT, "tiny.yaml", EXACT, *overrides]
    return slurm.run(*words, folder=folder).strip()


def output(folder: Path) -> str:
    """What the job has printed, over all its starts."""
    return "".join(file.read_text(errors="replace") for file in folder.glob("dsllm-*.log"))


def test_a_job_on_two_nodes_trains_as_one_host(slurm, reference, folder):
    number = submit(slurm, folder, f"deepspeed={ROOT / 'ds_configs' / 'zero3.json'}")
    job = slurm.wait_for_state(number, ["COMPLETED", "FAILED"], 120)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), output(folder)
    assert job["NodeList"] == "n[1-2]" and "2 ranks on cpu (started by srun" in output(folder)
    assert fingerprint(folder) == fingerprint(reference)
    assert losses(folder) == pytest.approx(
        losses(reference), rel=1e-5
    )  # ZeRO-3 compared with ZeRO-1: tests/engine/test_step.py
    assert status(folder)["state"] == "finished"
    seconds_until_gone(folder, 15)


@pytest.mark.timeout(400)
def test_a_job_at_its_time_limit_is_requeued_and_continues_to_the_last_bit(slurm, prepared, folder, tmp_path):
    """SLURM looks at its jobs every 30 s, and warns up to 30 s early: 29 to 59 s after this start."""
    options = ("--time=1", "--signal=B:USR1@1")
    # many held-out sequences in every step make steps slow, and change nothing that is trained
    slow = ["train.validate_every_steps=1", "train.validation_sequences=0", "checkpoint.every_steps=0"]
    file = folder / "tiny.yaml"
    run = yaml.safe_load(file.read_text())
    run["train"] |= {"total_tokens": 10**9, "schedule": {"warmup_steps": 4, "shape": "constant"}}
    file.write_text(yaml.safe_dump(run))
    number = submit(slurm, folder, *slow, options=options)
    wait_for(lambda: slurm.job(number)["Restarts"] == "1", 120, lambda: output(folder))
    step = status(folder)["step"]
    assert status(folder)["state"] == "interrupted" and step == num_steps(folder) > 4, output(folder)
    seconds_until_gone(folder, 15)

    total = step + 5  # the second start reads the run's file anew, and finds the budget nearly spent
    run["train"]["total_tokens"] = total * 8 * 32
    file.write_text(yaml.safe_dump(run))
    slurm.wait_for_state(number, ["PENDING"], 30)
    # SLURM would let a requeued job wait for two minutes, until what it signed for the first start has expired; it tells
    # old from new by the second, and a job that starts within the one in which it was ended fails silently
    time.sleep(2.1)
    slurm.run("scontrol", "update", f"JobId={number}", "StartTime=now")
    job = slurm.wait_for_state(number, ["COMPLETED", "FAILED"], 90)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), output(folder)
    assert f"resuming runs/tiny/checkpoints/step-{step:08d}" in output(folder)

    whole = copy_of(prepared, tmp_path / "whole")
    codes, text = jobs.train(whole, 2, ["tiny.yaml", EXACT, "checkpoint.every_steps=0", *budget(total)])
    assert codes == [0, 0], text
    assert losses(folder) == losses(whole) and fingerprint(folder) == fingerprint(whole)


def test_a_failing_rank_fails_the_job(slurm, folder):
    number = submit(slurm, folder, *ENDLESS, PYTHONPATH=FAULTY)
    wait_for(lambda: num_steps(folder) >= 5, 120, lambda: output(folder))
    rank_process(folder, 1).send_signal(signal.SIGUSR2)
    job = slurm.wait_for_state(number, ["COMPLETED", "FAILED"], 30)
    assert job["JobState"] == "FAILED" and re.fullmatch(r"[1-9]\d*:0", job["ExitCode"]), (job, output(folder))
    assert "MemoryError: made to fail" in output(folder) and "rank 0 of 2 lost another rank" in output(folder)
    assert status(folder)["state"] == "failed"
    seconds_until_gone(folder, 15)
    assert slurm.run("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * len(NODES)
