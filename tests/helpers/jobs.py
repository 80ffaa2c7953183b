"""Starts `dsllm train` on several real ranks as a launcher would, each forked from a process that has everything loaded."""

import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.ranks import context


@dataclass
class Job:
    """The ranks of one training job."""

    processes: list[Any]
    log: Path

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit codes of all ranks, by rank; -9 where a rank was killed."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                self.kill()
                raise TimeoutError(f"a rank is still running after {seconds} s:\n{self.output()}")
        return [process.exitcode for process in self.processes]

    def output(self) -> str:
        """What the ranks have printed so far."""
        return self.log.read_text(encoding="utf-8")

    def kill(self) -> None:
        """kill -9 of all ranks."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def send(self, number: signal.Signals, rank: int) -> None:
        """A signal to one rank."""
        os.kill(self.processes[rank].pid, number)

    def wait_for_step(self, metrics: Path, step: int, seconds: float = 60) -> None:
        """Until the run has recorded so many steps."""
        deadline = time.monotonic() + seconds
        while not metrics.is_file() or len(metrics.read_text().splitlines()) < step:
            assert time.monotonic() < deadline, self.output()
            assert self.processes[0].is_alive(), self.output()
            time.sleep(0.01)


def start_job(
    folder: Path,
    world_size: int,
    arguments: Sequence[str],
    file_size_limit: int = 0,
    command: str = "train",
    only_rank: int | None = None,
    planted: Mapping[int, Callable[[], None]] | None = None,
) -> Job:
    """Start `dsllm train ARGUMENTS` in `folder` on so many ranks.

    Args:
        file_size_limit: bytes beyond which no rank can write a file; 0: none.
        command: another command than train.
        only_rank: the only rank to start; None (default): all ranks.
        planted: by rank, what its process calls before the command; a function at the top of a module.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "log.txt"
    log.write_text("")
    processes = []
    for rank in range(world_size) if only_rank is None else [only_rank]:
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        process = context.Process(
            target=_rank_main,
            args=(folder, log, environment, [command, *arguments], file_size_limit, (planted or {}).get(rank)),
        )
        process.start()
        processes.append(process)
    return Job(processes, log)


def train(folder: Path, world_size: int, arguments: Sequence[str]) -> tuple[list[int], str]:
    """Run a job to its end: exit codes by rank, and what it printed."""
    job = start_job(folder, world_size, arguments)
    return job.wait(), job.output()


def _rank_main(
    folder: Path,
    log: Path,
    environment: dict[str, str],
    words: list[str],
    limit: int,
    planted: Callable[[], None] | None,
) -> None:
    import torch

    from dsllm.cli import run_command

    os.chdir(folder)
    os.environ |= environment
    torch.set_num_threads(1)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with log.open("a", buffering=1, encoding="utf-8") as file:
        sys.stdout = sys.stderr = file
        if planted is not None:
            planted()
        code = run_command(words[0], words[1:])
    sys.exit(code)
