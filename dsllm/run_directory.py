"""The run directory, a contract on disk: every name in it, its lock, its status and its metrics."""

import fcntl
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

RUN_FILE = "run.yaml"
"""The resolved run."""
DEEPSPEED_FILE = "deepspeed.json"
"""The final DeepSpeed config."""
STATUS_FILE = "status.json"
"""running, interrupted, finished or failed, and how far the run is."""
METRICS_FILE = "metrics.jsonl"
"""One row per optimizer step."""
LAYER_STATISTICS_FILE = "layer_statistics.jsonl"
DATA_CARD_FILE = "data_card.json"
"""What the run was trained on."""
DATA_VERIFIED_FILE = "data_verified.json"
"""Which token shards were compared with their checksums."""
LOSS_PICTURE = "loss.png"
LOCK_FILE = "lock"
CHECKPOINTS = "checkpoints"
"""Folder of its checkpoints."""
TOKENIZER = "tokenizer"
"""Folder of its tokenizer."""
TENSORBOARD = "tensorboard"
PROFILE = "profile"
"""Folder of traces."""
EVALUATIONS = "eval"
"""Folder with a JSON file per evaluated checkpoint."""
LAUNCHES = "launch"
"""Folder with the files and the output of each job that `dsllm launch` started."""


@dataclass
class RunLock:
    """Held by rank 0 while a run is alive. The kernel releases it when the process ends, however it ends."""

    file: IO[str]

    def release(self) -> None:
        """Release the lock, so that another run can use the directory."""
        self.file.close()


def lock_run(directory: Path, report: Callable[[str], None]) -> RunLock:
    """Take the run's lock, and make the directory if there is none. The lock of a process that has died is free.

    Args:
        report: called with a warning where the file system has no locks.

    Raises:
        RunError: a run is alive in the directory; names its host and process.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115 - held open for the life of the run
    except OSError as error:
        raise RunError(f"run.directory {directory}: cannot be used: {error.strerror or error}") from error
    try:
        hold_lock(file)
    except HeldElsewhereError as error:
        file.close()
        raise RunError(_alive(directory, str(error))) from None
    except LocksUnsupportedError as error:
        report(f"{directory}: cannot be locked ({error}): make sure that no other run uses this directory")
    return RunLock(file)


def refuse_live_run(directory: Path) -> None:
    """Look whether a run is alive in a directory, without taking or creating anything.

    Raises:
        RunError: it is; names its host and process.
    """
    if is_locked(directory):  # on a file system without locks, `lock_run` has the last word
        holder = (directory / LOCK_FILE).read_text(encoding="utf-8").strip() or "an unknown process"
        raise RunError(_alive(directory, holder))


def is_locked(directory: Path) -> bool | None:
    """Whether a run is alive in a directory; takes and creates nothing. None: the file system has no locks."""
    try:
        with open(directory / LOCK_FILE, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released when the file is closed
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return False


def _alive(directory: Path, holder: str) -> str:
    return f"{directory}: a run is alive here ({holder}); wait for it, stop it, or set another run.directory"


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
            f"run.directory {directory} is not shared: {', '.join(blind)} cannot see what rank 0 on {answers[0][1]} wrote; "
            "name a folder that every host sees"
        )


def write_status(directory: Path, state: str, **facts: Any) -> None:
    """Write status.json, which counts where a launcher hides the exit codes of its ranks.

    Args:
        state: running, interrupted, finished or failed
    """
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


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, one per step, in order. After a resume later rows win; a line cut by a kill is skipped.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    rows: dict[int, dict[str, Any]] = {}
    with (directory / METRICS_FILE).open(encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            step = row["step"]
            if step in rows:  # resumed: what came after this step was never reached by the run that counts
                rows = {number: kept for number, kept in rows.items() if number < step}
            rows[step] = row
    return [rows[step] for step in sorted(rows)]
