"""Real launchers start the same run: the same samples, the same losses, a true exit code or status."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsllm.processes import free_port
from tests.helpers.launched import (
    BIN,
    ENDLESS,
    ENTRY,
    EXACT,
    Launched,
    budget,
    copy_of,
    fingerprint,
    kill_left_over,
    launch,
    losses,
    prepare_folder,
    status,
    wait_for,
)
from tests.helpers.tiny_job import NUM_STEPS

pytestmark = pytest.mark.slow


def command(launcher: str) -> list[str]:
    """How a launcher starts two ranks of the entry point, or one."""
    return {
        "python": [sys.executable, ENTRY],
        "dsllm": [str(BIN / "dsllm"), "train"],
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), ENTRY],
        "hostfile": [
            *(str(BIN / "deepspeed"), "--hostfile", "hosts", "--master_port", str(free_port())),
            *("--no_ssh_check", "--master_addr", "127.0.0.1", ENTRY),  # this machine need not be reachable by ssh
        ],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()), ENTRY],
    }[launcher]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with a run's YAML, its data and a hostfile of this machine."""
    folder = tmp_path_factory.mktemp("launchers") / "job"
    prepare_folder(folder)
    return folder


@pytest.fixture
def folder(prepared, tmp_path) -> Iterator[Path]:
    yield copy_of(prepared, tmp_path / "job")
    kill_left_over(tmp_path)


def run(words: list[str], folder: Path) -> tuple[int, str]:
    """Exit code and output."""
    job: Launched = launch(words, folder)
    return job.wait(240), job.output()


@pytest.fixture(scope="module")
def by_deepspeed(prepared, tmp_path_factory) -> Path:
    """What `deepspeed --num_gpus 2` leaves."""
    folder = copy_of(prepared, tmp_path_factory.mktemp("deepspeed") / "job")
    code, output = run([*command("deepspeed"), "--config", "tiny.yaml", EXACT], folder)
    assert code == 0, output
    assert "2 ranks on cpu (started by deepspeed; 1 threads and 1 cores each, not bound)" in output
    assert len(losses(folder)) == NUM_STEPS
    return folder


@pytest.mark.parametrize("launcher", ["hostfile", "torchrun"])
def test_two_ranks_are_two_ranks_whoever_starts_them(by_deepspeed, folder, launcher):
    code, output = run([*command(launcher), "--config", "tiny.yaml", EXACT], folder)
    assert code == 0, output
    assert losses(folder) == losses(by_deepspeed) and fingerprint(folder) == fingerprint(by_deepspeed)


@pytest.mark.parametrize("launcher", ["python", "dsllm"])
def test_one_process_sees_the_same_samples(by_deepspeed, folder, launcher):
    code, output = run([*command(launcher), "tiny.yaml", EXACT], folder)
    assert code == 0, output
    assert fingerprint(folder) == fingerprint(by_deepspeed)
    assert losses(folder) == pytest.approx(losses(by_deepspeed), rel=1e-5)  # the bound of tests/engine/test_step.py


def test_a_missing_hostfile_is_no_silent_local_run(folder):
    (folder / "hosts").unlink()
    code, output = run([*command("hostfile"), "--config", "tiny.yaml"], folder)
    assert code != 0
    assert "--hostfile hosts: no such file" in output and not (folder / "runs").exists()


def test_an_unknown_key_fails_the_job_in_words(folder):
    code, output = run([*command("deepspeed"), "--config", "tiny.yaml", "train.totl_tokens=3"], folder)
    assert code != 0 and "did you mean 'total_tokens'?" in output
    assert "Traceback" not in output.split("dsllm train: error")[1].split("[launch")[0]


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_ctrl_c_saves_and_the_same_command_continues(folder, launcher):
    """A terminal's Ctrl-C reaches the launcher and all ranks at once."""
    words = [*command(launcher), "--config", "tiny.yaml", EXACT]
    job = launch([*words, *ENDLESS], folder)
    job.wait_for_step(5)
    job.send(signal.SIGINT, to_all=True)
    assert job.wait() != 0
    # a launcher may leave before its ranks have saved
    wait_for(lambda: status(folder)["state"] != "running", 60, job.output)
    state, step = status(folder)["state"], status(folder)["step"]
    assert state == "interrupted" and step == len(losses(folder))
    code, output = run([*words, *budget(step + 3)], folder)
    assert code == 0 and f"resuming runs/tiny/checkpoints/step-{step:08d}" in output, output
    assert len(losses(folder)) == step + 3
