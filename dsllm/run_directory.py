"""The run directory, a contract on disk: every name in it, its lock, its status and its metrics."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dsllm.errors import RunError
from dsllm.files import (
    HeldElsewhereError,
    LocksUnsupportedError,
    hold_lock,
    open_regular,
    write_atomically,
    write_in_place,
)
from dsllm.untrusted_files import UntrustedFileError, read_json

FORMAT_VERSION = 1
MOST_STATUS_BYTES = 2**20
_MOST_ROW_BYTES = 2**20
_TAIL_BYTES = 2**14
"""The end of metrics.jsonl, some forty rows."""

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


class DamagedStatusError(RunError):
    """status.json is not what a run writes. It can be read again a moment later, or removed."""


@dataclass
class RunLock:
    """Held by rank 0 while a run is alive. The kernel releases it when the process ends, however it ends."""

    path: Path
    file: IO[str]

    def is_in_place(self) -> bool:
        """Whether the locked file is still the one in the directory: after a removal another run could take a new one."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), os.lstat(self.path))
        except FileNotFoundError:
            return False
        except OSError:  # a network file system that does not answer for a moment
            return True

    def release(self) -> None:
        """Release the lock, so that another run can use the directory."""
        self.file.close()


def lock_run(directory: Path, report: Callable[[str], None]) -> RunLock:
    """Take the run's lock, and make the directory if there is none. The lock of a process that has died is free.

    Args:
        report: called with a warning where the file system has no locks.

    Raises:
        RunError: a run is alive in the directory, and its host and process are named; or the lock cannot be used.
    """
    path = directory / LOCK_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise RunError(f"{path}: is not a file, so it cannot be the lock of a run: remove it")
        file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 - held open for the life of the run
    except OSError as error:
        raise RunError(f"run.directory {directory}: cannot be used: {error.strerror or error}") from error
    try:
        hold_lock(file)
    except HeldElsewhereError as error:
        file.close()
        raise RunError(_alive(directory, str(error))) from None
    except LocksUnsupportedError as error:
        report(f"{directory}: cannot be locked ({error}): make sure that no other run uses this directory")
    except OSError as error:
        file.close()
        raise RunError(f"run.directory {directory}: cannot be locked: {error.strerror or error}") from error
    return RunLock(path, file)


def refuse_live_run(directory: Path) -> None:
    """Look whether a run is alive in a directory, without taking or creating anything.

    Raises:
        RunError: it is; names its host and process.
    """
    if is_locked(directory):  # on a file system without locks, `lock_run` has the last word
        holder = (directory / LOCK_FILE).read_text(encoding="utf-8", errors="replace").strip() or "an unknown process"
        raise RunError(_alive(directory, holder))


def is_locked(directory: Path) -> bool | None:
    """Whether a run is alive in a directory; takes and creates nothing. None: the file system has no locks."""
    path = directory / LOCK_FILE
    if not path.is_file():  # a pipe would wait for a writer
        return False
    try:
        with open(path, "rb") as file:
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
    probe, word = directory / ".shared-probe", str(os.getpid())
    try:
        if rank == 0:
            try:
                write_atomically(probe, word)
            except OSError as error:  # sent to the other ranks, which wait for a number
                word = f"run.directory {directory}: cannot be written: {error.strerror or error}"
        expected = gather(word)[0]
        if not expected.isdigit():
            raise RunError(expected)
        answers = gather((_contains(probe, expected), socket.gethostname()))
    finally:
        if rank == 0:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)
    blind = [f"rank {r} on {host}" for r, (good, host) in enumerate(answers) if not good]
    if blind:
        raise RunError(
            f"run.directory {directory} is not shared: {', '.join(blind)} cannot see what rank 0 on {answers[0][1]} wrote; "
            "name a folder that every host sees"
        )


def _contains(path: Path, expected: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == expected
    except (OSError, ValueError):
        return False


def write_status(directory: Path, state: str, **facts: Any) -> None:
    """Write status.json, which counts where a launcher hides the exit codes of its ranks.

    Where no new file fits on the disk, the old one is overwritten.

    Args:
        state: running, interrupted, finished or failed

    Raises:
        OSError: it could not be written.
    """
    status = {
        "format_version": FORMAT_VERSION,
        "state": state,
        "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **facts,
    }
    path, content = directory / STATUS_FILE, json.dumps(status, indent=2) + "\n"
    try:
        write_atomically(path, content)
    except OSError as error:
        try:
            write_in_place(path, content)
        except OSError:
            raise error from None


def read_status(directory: Path) -> dict[str, Any]:
    """status.json of a run; empty if there is none.

    Raises:
        RunError: written by a newer format version, or not readable.
    """
    path = directory / STATUS_FILE
    if not path.is_file():
        return {}
    try:
        status = read_json(path, MOST_STATUS_BYTES)
    except (OSError, UntrustedFileError) as error:
        raise DamagedStatusError(f"{path}: is not readable: {error}") from error
    version = status.get("format_version") if isinstance(status, dict) else None
    if not isinstance(version, int) or version < 1:
        raise DamagedStatusError(f"{path}: is not readable: it is not the status of a run")
    if version != FORMAT_VERSION:
        raise RunError(f"{path}: has format version {version}; this dsllm reads version {FORMAT_VERSION}")
    return dict(status)


def status_or_nothing(directory: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """status.json of a run; empty if there is none or it is damaged, since its checkpoints say how far the run is.

    Args:
        report: called with a warning about the damage.

    Raises:
        RunError: written by a newer format version.
    """
    try:
        return read_status(directory)
    except DamagedStatusError as error:
        report(f"{error}; the newest sound checkpoint says how far the run is")
        return {}


def state_interrupted(directory: Path, reason: str) -> None:
    """Correct the status of a run that was killed: an attempt that was stopped before it held the directory calls this.

    Any other state stays as it is, and so does that of a run that is alive.
    """
    with contextlib.suppress(RunError, OSError):
        status = read_status(directory)
        if status.get("state") != "running":
            return
        lock = lock_run(directory, lambda text: None)
        try:
            kept = {name: value for name, value in status.items() if name not in ("format_version", "state", "updated")}
            write_status(directory, "interrupted", **(kept | {"reason": f"{reason}, before the first step"}))
        finally:
            lock.release()


def last_attempt(directory: Path) -> int:
    """Number of the newest attempt that the status or the last rows of metrics.jsonl name; 0: none."""
    numbers = [0]
    with contextlib.suppress(RunError):
        numbers.append(read_status(directory).get("attempt", 0))
    with contextlib.suppress(OSError), open_regular(directory / METRICS_FILE) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        numbers += [row["attempt"] for row in _rows(file) if "attempt" in row]
    return max(number for number in numbers if type(number) is int)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, one per step, in order. After a resume later rows win.

    A line that a kill has cut, or that is no row for another reason, is skipped.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    rows: dict[int, dict[str, Any]] = {}
    with open_regular(directory / METRICS_FILE) as file:
        for row in _rows(file):
            step = row["step"]
            if step in rows:  # resumed: what came after this step was never reached by the run that counts
                rows = {number: kept for number, kept in rows.items() if number < step}
            rows[step] = row
    return [rows[step] for step in sorted(rows)]


def _rows(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The lines of a file that are rows of a step: JSON objects with a step, and numbers where numbers belong."""
    while line := file.readline(_MOST_ROW_BYTES):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and all(map(_is_number, _numbers_of(row))):
            yield row


def _numbers_of(row: Mapping[str, Any]) -> list[Any]:
    return [row[name] for name in ("tokens", "loss", "validation_loss", "attempt") if name in row]


def _is_number(value: Any) -> bool:
    """Whether a value is a number or null: null stands for a number that is not finite."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
