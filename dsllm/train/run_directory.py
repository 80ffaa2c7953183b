"""The run directory: a contract on disk. One live run at a time, seen by all hosts, readable by every other command."""

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dsllm.errors import RunError
from dsllm.files import HeldElsewhereError, LocksUnsupportedError, hold_lock, write_atomically

FORMAT_VERSION = 1
RUN_FILE, DEEPSPEED_FILE, STATUS_FILE, METRICS_FILE = "run.yaml", "deepspeed.json", "status.json", "metrics.jsonl"
LAYER_STATISTICS_FILE = "layer_statistics.jsonl"


@dataclass
class RunLock:
    """Held by rank 0 while a run is alive. The kernel releases it when the process ends, however it ends."""

    file: IO[str]

    def release(self) -> None:
        """Let another run use the directory."""
        self.file.close()


def lock_run(directory: Path, report: Callable[[str], None]) -> RunLock:
    """Take the run's lock; one left by a process that has died is free.

    Args:
        report: gets a warning where the file system has no locks.

    Raises:
        RunError: a run is alive in the directory; names its host and process.
    """
    path = directory / "lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held open for the life of the run
    except OSError as error:
        raise RunError(f"run.directory {directory}: cannot be used: {error.strerror or error}") from error
    try:
        hold_lock(file)
    except HeldElsewhereError as error:
        file.close()
        raise RunError(
            f"{directory}: a run is alive here ({error}); wait for it, stop it, or set another run.directory"
        ) from None
    except LocksUnsupportedError as error:
        report(f"{directory}: cannot be locked ({error}): make sure that no other run uses this directory")
    return RunLock(file)


def check_shared(directory: Path, rank: int, gather: Callable[[Any], list[Any]]) -> None:
    """Every rank must see the same run directory; a collective call.

    Raises:
        RunError: on all ranks, naming those that do not see what rank 0 wrote.
    """
    probe = directory / ".shared-probe"
    if rank == 0:
        write_atomically(probe, str(os.getpid()))
    expected = gather(str(os.getpid()))[0]
    seen = probe.is_file() and probe.read_text(encoding="utf-8") == expected
    answers = gather((seen, socket.gethostname()))
    if rank == 0:
        probe.unlink(missing_ok=True)
    blind = [f"rank {r} on {host}" for r, (good, host) in enumerate(answers) if not good]
    if blind:
        raise RunError(
            f"run.directory {directory} is not shared: {', '.join(blind)} cannot see what rank 0 on {answers[0][1]} wrote"
        )


def write_status(directory: Path, state: str, **facts: Any) -> None:
    """status.json: running, interrupted, finished or failed; the word of a run whose launcher hides exit codes."""
    status = {
        "format_version": FORMAT_VERSION,
        "state": state,
        "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **facts,
    }
    write_atomically(directory / STATUS_FILE, json.dumps(status, indent=2) + "\n")


def read_status(directory: Path) -> dict[str, Any]:
    """status.json of a run; empty if there is none.

    Raises:
        RunError: written by another format version, or not readable.
    """
    path = directory / STATUS_FILE
    if not path.is_file():
        return {}
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: is not readable: {error}") from error
    version = status.get("format_version") if isinstance(status, dict) else None
    if version != FORMAT_VERSION:
        raise RunError(f"{path}: has format version {version}; this dsllm reads version {FORMAT_VERSION}")
    return dict(status)
