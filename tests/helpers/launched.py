"""Starts a tiny run through a launcher, as a user would, and reports its exit code, losses, order, and what is left of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from dsllm.train.picture import read_metrics
from tests.helpers.tiny_job import CORPUS, RUN

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ENTRY = str(ROOT / "launch" / "pretrain.py")
WITHOUT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in WITHOUT},
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "TMPDIR": os.environ.get("TMPDIR", "/tmp"),
}
FAULTY = str(Path(__file__).parent / "faulty")
"""On PYTHONPATH: SIGUSR2 makes a process raise an error."""
RUN_NAME = RUN["run"]["name"]
RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
STEP_TOKENS = RUN["train"]["global_batch_sequences"] * RUN["data"]["sequence_length"]

EXACT = "model.dropout=0"
"""Dropout belongs to ranks; without it the losses of one rank and of two are comparable."""
ENDLESS = (f"train.total_tokens={50_000 * STEP_TOKENS}", "train.schedule.shape=constant")
"""A budget that is never spent here, at a learning rate that does not depend on it."""


def budget(num_steps: int) -> tuple[str, str]:
    """The overrides that end an endless run after so many steps."""
    return (f"train.total_tokens={num_steps * STEP_TOKENS}", ENDLESS[1])


@dataclass
class Launched:
    """A launcher that was started."""

    process: subprocess.Popen
    folder: Path
    log: Path

    def wait(self, seconds: float = 120) -> int:
        """The launcher's exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"still running after {seconds} s:\n{self.output()}") from None

    def output(self) -> str:
        """What launcher and ranks have printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        """Until the run has recorded so many steps."""
        wait_for(
            lambda: num_steps(self.folder) >= step,
            seconds,
            lambda: f"{num_steps(self.folder)} steps:\n{self.output()}",
            or_ended=self.process,
        )

    def send(self, number: signal.Signals, to_all: bool = False) -> None:
        """A signal to the launcher alone, or to its whole process group, as a terminal's Ctrl-C."""
        if to_all:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)


def launch(words: Sequence[str], folder: Path, environment: Mapping[str, str] = ENVIRONMENT) -> Launched:
    """Start a launcher in `folder`, in a process group of its own."""
    log = folder / "output.txt"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            list(words),
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Launched(process, folder, log)


def prepare_folder(folder: Path) -> None:
    """The YAML of a tiny run without dropout, its corpus, and its token shards."""
    (folder / "corpus").mkdir(parents=True)
    text = CORPUS.read_text(encoding="utf-8")
    for i in range(30):
        (folder / "corpus" / f"{i:02d}.txt").write_text(text[2000 * i : 2000 * (i + 1)], encoding="utf-8")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RUN))
    (folder / "hosts").write_text("localhost slots=2\n")
    job = launch([str(BIN / "dsllm"), "prepare", "tiny.yaml"], folder)
    assert job.wait() == 0, job.output()


def copy_of(prepared: Path, folder: Path) -> Path:
    """A folder of its own for a job, with the prepared data."""
    shutil.copytree(prepared, folder)
    return folder


def losses(folder: Path) -> list[float]:
    """The run's losses, by step."""
    return [row["loss"] for row in read_metrics(folder / "runs" / RUN_NAME)]


def num_steps(folder: Path) -> int:
    """Steps recorded so far."""
    file = folder / "runs" / RUN_NAME / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def fingerprint(folder: Path) -> int:
    """What the newest checkpoint says about the order of all samples so far."""
    manifest = max((folder / "runs" / RUN_NAME / "checkpoints").glob("step-*")) / "manifest.json"
    return int(json.loads(manifest.read_text())["progress"]["fingerprint"])


def status(folder: Path) -> dict[str, Any]:
    """The run's status.json."""
    return dict(json.loads((folder / "runs" / RUN_NAME / "status.json").read_text()))


def processes_in(folder: Path) -> list[psutil.Process]:
    """What still runs in the folder or has it on its command line, on any host of this machine."""
    found = []
    for process in psutil.process_iter():
        try:
            inside = Path(process.cwd()).is_relative_to(folder) or any(str(folder) in w for w in process.cmdline())
            if inside and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def rank_process(folder: Path, rank: int) -> psutil.Process:
    """The process of a rank."""
    for process in processes_in(folder):
        try:
            words, variables = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        numbers = [variables[name] for name in RANK_VARIABLES if name in variables]
        is_rank = "python" in Path(words[0]).name and (ENTRY in words or "train" in words)
        if is_rank and numbers[:1] == [str(rank)]:
            return process
    raise AssertionError(f"no process of rank {rank} in {folder}")


def kill_left_over(folder: Path) -> list[psutil.Process]:
    """End what still runs in the folder; what that was."""
    left = processes_in(folder)
    for process in left:
        process.kill()
    return left


def seconds_until_gone(folder: Path, seconds: float = 60) -> float:
    """How long it takes until no process of the folder is left."""
    began = time.monotonic()
    wait_for(
        lambda: not processes_in(folder),
        seconds,
        lambda: "left over: " + "; ".join(" ".join(p.cmdline()) for p in processes_in(folder)),
    )
    return time.monotonic() - began


def wait_for(
    ready: Callable[[], bool], seconds: float, describe: Callable[[], str], or_ended: subprocess.Popen | None = None
) -> None:
    """Wait until something is so.

    Raises:
        AssertionError: it is not so in time, or the process ended before.
    """
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"not so after {seconds} s: {describe()}"
        assert or_ended is None or or_ended.poll() is None, f"ended too early: {describe()}"
        time.sleep(0.05)
