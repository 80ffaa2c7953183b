"""Real launchers start the same run: the same samples, the same losses, a true exit code or status."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dsllm.train.picture import read_metrics
from tests.cli.test_train import CORPUS, NUM_STEPS, RUN

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ENTRY = str(ROOT / "launch" / "pretrain.py")
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "TMPDIR": os.environ.get("TMPDIR", "/tmp"),
}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def command(launcher: str) -> list[str]:
    """How a launcher starts two ranks of the entry point, or one."""
    return {
        "python": [sys.executable, ENTRY],
        "dsllm": [str(BIN / "dsllm"), "train"],
        "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", free_port(), ENTRY],
        "hostfile": [
            *(str(BIN / "deepspeed"), "--hostfile", "hosts", "--master_port", free_port()),
            *("--no_ssh_check", "--master_addr", "127.0.0.1", ENTRY),  # this machine need not be reachable by ssh
        ],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", free_port(), ENTRY],
    }[launcher]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with a run's YAML, its data and a hostfile of this machine."""
    folder = tmp_path_factory.mktemp("launchers")
    (folder / "corpus").mkdir()
    text = CORPUS.read_text(encoding="utf-8")
    for i in range(30):
        (folder / "corpus" / f"{i:02d}.txt").write_text(text[2000 * i : 2000 * (i + 1)], encoding="utf-8")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RUN))
    (folder / "hosts").write_text("localhost slots=2\n")
    done = run([str(BIN / "dsllm"), "prepare", "tiny.yaml"], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def folder(prepared, tmp_path) -> Path:
    shutil.copytree(prepared, tmp_path / "job")
    return tmp_path / "job"


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "runs" / "tiny")]


def fingerprint(folder: Path) -> int:
    manifest = max((folder / "runs" / "tiny" / "checkpoints").glob("step-*")) / "manifest.json"
    return json.loads(manifest.read_text())["progress"]["fingerprint"]


@pytest.fixture(scope="module")
def by_deepspeed(prepared, tmp_path_factory) -> Path:
    """What `deepspeed --num_gpus 2` leaves."""
    folder = tmp_path_factory.mktemp("deepspeed") / "job"
    shutil.copytree(prepared, folder)
    done = run([*command("deepspeed"), "--config", "tiny.yaml", "model.dropout=0"], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks on cpu (started by deepspeed, 1 threads each)" in done.stdout
    assert len(losses(folder)) == NUM_STEPS
    return folder


@pytest.mark.parametrize("launcher", ["hostfile", "torchrun"])
def test_two_ranks_are_two_ranks_whoever_starts_them(by_deepspeed, folder, launcher):
    done = run([*command(launcher), "--config", "tiny.yaml", "model.dropout=0"], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(folder) == losses(by_deepspeed) and fingerprint(folder) == fingerprint(by_deepspeed)


@pytest.mark.parametrize("launcher", ["python", "dsllm"])
def test_one_process_sees_the_same_samples(by_deepspeed, folder, launcher):
    done = run([*command(launcher), "tiny.yaml", "model.dropout=0"], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert fingerprint(folder) == fingerprint(by_deepspeed)
    assert losses(folder) == pytest.approx(losses(by_deepspeed), rel=1e-5)  # the bound of tests/engine/test_step.py


def test_a_missing_hostfile_is_no_silent_local_run(folder):
    (folder / "hosts").unlink()
    done = run([*command("hostfile"), "--config", "tiny.yaml"], folder)
    assert done.returncode != 0
    assert "--hostfile hosts: no such file" in done.stderr and not (folder / "runs").exists()


def test_an_unknown_key_fails_the_job_in_words(folder):
    done = run([*command("deepspeed"), "--config", "tiny.yaml", "train.totl_tokens=3"], folder)
    assert done.returncode != 0 and "did you mean 'total_tokens'?" in done.stderr
    assert "Traceback" not in done.stderr.split("dsllm train: error")[1].split("[launch")[0]


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_ctrl_c_saves_and_the_same_command_goes_on(by_deepspeed, folder, launcher):
    """A terminal's Ctrl-C reaches the launcher and all ranks at once."""
    words = [*command(launcher), "--config", "tiny.yaml", "model.dropout=0"]
    more = [*words, f"train.total_tokens={5000 * 8 * 32}", "train.schedule.shape=constant"]
    file = folder / "runs" / "tiny" / "metrics.jsonl"
    with subprocess.Popen(more, cwd=folder, env=ENVIRONMENT, start_new_session=True, text=True) as job:
        deadline = time.monotonic() + 120
        while not file.is_file() or len(file.read_text().splitlines()) < 5:
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGINT)
        assert job.wait(120) != 0
    wait_until_gone(folder)
    status = json.loads((folder / "runs" / "tiny" / "status.json").read_text())
    assert status["state"] == "interrupted" and status["step"] == len(losses(folder))
    budget = f"train.total_tokens={(status['step'] + 3) * 8 * 32}"
    done = run([*words, budget, "train.schedule.shape=constant"], folder)
    assert done.returncode == 0 and f"resuming runs/tiny/checkpoints/step-{status['step']:08d}" in done.stdout, (
        done.stderr
    )
    assert len(losses(folder)) == status["step"] + 3


def wait_until_gone(folder: Path) -> None:
    """A launcher may leave before its ranks have saved."""
    deadline = time.monotonic() + 60
    while json.loads((folder / "runs" / "tiny" / "status.json").read_text())["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.1)
