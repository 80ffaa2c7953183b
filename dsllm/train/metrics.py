"""Writes what a run measures: metrics.jsonl, TensorBoard, and lines for the terminal. Rank 0 only."""

import errno
import json
import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from torch.utils.tensorboard import SummaryWriter

from dsllm.config.run import RunConfig
from dsllm.engine.step import StepResult
from dsllm.run_directory import LAYER_STATISTICS_FILE, METRICS_FILE, TENSORBOARD
from dsllm.session.progress import Progress

_RECENT_STEPS = 50
_MOST_WAITING_BYTES = 2**26
"""Rows that wait for a full disk: 64 MiB are more than 100,000 steps."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What throughput is measured against."""

    flops_per_token: float
    """Model FLOPs of forward and backward, by formula."""
    peak_flops: float
    """FLOP/s of all devices together; 0: unknown."""
    peak_origin: str
    """Where that number comes from."""


class RowFile:
    """Appends rows to a file, as lines of JSON. Rows that cannot be written wait in memory, and the run continues."""

    def __init__(self, path: Path, report: Callable[[str], None]):
        self.path, self._report = path, report
        self._file: IO[bytes] | None = None
        self._waiting = bytearray()
        self._failing = False

    def open(self) -> None:
        """Start appending.

        Raises:
            OSError: the file cannot be written.
        """
        if self.path.exists() and not self.path.is_file():  # a pipe would wait for a reader
            code = errno.EISDIR if self.path.is_dir() else errno.EINVAL
            raise OSError(code, os.strerror(code), str(self.path))
        if _is_cut(self.path):  # by a kill
            self._waiting[:0] = b"\n"
        # unbuffered: what the disk refuses waits here, not in a buffer of the library
        self._file = self.path.open("ab", buffering=0)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write each row as a line of its own, after those that still wait."""
        self._waiting += "".join(json.dumps(row) + "\n" for row in rows).encode()
        try:
            self._write()
        except OSError as error:
            if not self._failing:  # once is enough
                self._failing = True
                self._report(f"{self.path}: cannot be written, its rows wait in memory: {error.strerror or error}")
            self._drop_oldest()
            return
        if self._failing:
            self._failing = False
            self._report(f"{self.path}: can be written again")

    def reopen(self) -> None:
        """Continue in a new file after somebody has removed the old one."""
        if self._file is not None:
            self._file.close()
        self._file = None
        self.append([])

    def close(self) -> None:
        """Write what still waits, if that is possible now, and close the file."""
        try:
            if self._waiting:
                self._write()
        except OSError:
            lost = self._waiting.count(b"\n")
            self._report(f"{self.path}: {lost} rows are missing, because the disk did not take them until the end")
        if self._file is not None:
            self._file.close()

    def _write(self) -> None:
        if self._file is None:
            self.open()
        assert self._file is not None
        while self._waiting:  # a disk may take a part of a line: the next attempt continues behind it
            del self._waiting[: self._file.write(self._waiting)]

    def _drop_oldest(self) -> None:
        """Bound the memory of a disk that stays full for weeks."""
        if len(self._waiting) > _MOST_WAITING_BYTES:
            del self._waiting[: self._waiting.index(b"\n", len(self._waiting) - _MOST_WAITING_BYTES // 2) + 1]
            self._waiting[:0] = b"\n"  # perhaps the file ends in the middle of a dropped line


@dataclass
class Metrics:
    """Writes one row per step. A file or tracker that fails is reported once; it never stops a run."""

    directory: Path
    config: RunConfig
    speed: Speed
    attempt: int
    report: Callable[[str], None]
    rows: RowFile = field(init=False)
    layers: RowFile = field(init=False)
    board: SummaryWriter | None = field(init=False, default=None)
    _hook: Callable[[threading.ExceptHookArgs], object] | None = field(init=False, default=None)
    recent_seconds: deque[float] = field(init=False, default_factory=lambda: deque(maxlen=_RECENT_STEPS))

    def __post_init__(self) -> None:
        self.rows = RowFile(self.directory / METRICS_FILE, self.report)
        self.layers = RowFile(self.directory / LAYER_STATISTICS_FILE, self.report)

    def open(self, steps_done: int) -> None:
        """Start appending.

        Raises:
            OSError: metrics.jsonl cannot be written.
        """
        self.rows.open()
        if self.config.log.tensorboard:
            self._hook, threading.excepthook = threading.excepthook, self._thread_failed
            try:
                # steps count from 1: the last finished step keeps its point
                self.board = SummaryWriter(str(self.directory / TENSORBOARD), purge_step=steps_done + 1)
            except OSError as error:
                self._switch_board_off(error)

    def reopen(self) -> None:
        """Continue in new files after somebody has removed the directory."""
        self.rows.reopen()

    def close(self) -> None:
        """Flush and close everything."""
        self.rows.close()
        self.layers.close()
        if self.board is not None:
            try:
                self.board.close()
            except OSError as error:
                self._switch_board_off(error)
        if self._hook is not None:
            threading.excepthook, self._hook = self._hook, None

    def row(
        self, result: StepResult, progress: Progress, learning_rate: float, seconds: float, memory_gib: float
    ) -> dict[str, Any]:
        """The row of one step."""
        self.recent_seconds.append(seconds)
        per_second = result.tokens / seconds
        peak = self.speed.peak_flops
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": result.loss,
            "gradient_norm": result.gradient_norm,
            "learning_rate": learning_rate,
            "loss_scale": result.loss_scale,
            "skipped_steps": progress.skipped_steps,
            "tokens_per_second": per_second,
            "mfu": per_second * self.speed.flops_per_token / peak if peak else None,
            "memory_gib": memory_gib,
            "seconds": seconds,
            "eta_seconds": statistics.median(self.recent_seconds) * (self.config.num_steps - progress.step),
            "time": time.time(),
            "attempt": self.attempt,
        }

    def record(self, row: Mapping[str, Any]) -> None:
        """Write a step's row to the file and to TensorBoard."""
        clean = _finite(row)
        self.rows.append([clean])
        self._show({key: v for key, v in clean.items() if key not in ("step", "time", "attempt")}, row["step"])

    def record_layers(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the statistics of a step's layers, one line for each, to their file and to TensorBoard."""
        if not rows:
            return
        clean = [{"step": step, **_finite(row), "attempt": self.attempt} for row in rows]
        self.layers.append(clean)
        for row in clean:
            measured = {key: v for key, v in row.items() if key not in ("step", "layer", "attempt")}
            self._show({f"{key}/{row['layer']}": v for key, v in measured.items()}, step)

    def _show(self, values: Mapping[str, float | None], step: int) -> None:
        """Add a point to each of TensorBoard's curves."""
        if self.board is None:
            return
        try:
            for key, value in values.items():
                if value is not None:
                    self.board.add_scalar(key, value, step)
        except OSError as error:
            self._switch_board_off(error)

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard's own thread prints a traceback on a full disk; the same error then reaches `_show`, in words."""
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard.")):
            assert self._hook is not None, "it is there while the board is open"
            self._hook(failure)

    def _switch_board_off(self, error: OSError) -> None:
        self.board = None
        self.report(f"TensorBoard is switched off: {error}")


def _is_cut(path: Path) -> bool:
    """Whether a file ends in the middle of a line."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with null for numbers that are not finite, which JSON does not have."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def step_line(row: Mapping[str, Any], config: RunConfig) -> str:
    """One step as a line for the terminal."""
    parts = [
        f"step {row['step']}/{config.num_steps}",
        f"tokens {short(row['tokens'])}/{short(config.num_steps * config.tokens_per_step)}",
        f"loss {row['loss']:.4f}",
        f"grad {row['gradient_norm']:.3f}",
        f"lr {row['learning_rate']:.2e}",
        f"{short(row['tokens_per_second'])} tok/s",
    ]
    if row["mfu"] is not None:
        parts.append(f"MFU {row['mfu']:.1%}")
    if row["loss_scale"] != 1:
        parts.append(f"scale {row['loss_scale']:g}")
    if row["skipped_steps"]:
        parts.append(f"skipped {row['skipped_steps']}")
    parts += [f"{row['memory_gib']:.2f} GiB", f"ETA {duration(row['eta_seconds'])}"]
    return "  ".join(parts)


def short(count: float) -> str:
    """A count with a unit: 1.2k, 3.4M, 5.6B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def duration(seconds: float) -> str:
    """Seconds as 1d02h, 3h04m, 5m06s or 7s."""
    whole = round(seconds)
    for unit, size, smaller, small in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small:02d}{smaller}"
    return f"{whole}s"
