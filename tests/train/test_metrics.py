"""What a run reports while it trains survives kills, full disks and broken trackers."""

import dataclasses
import json
import math
import resource
import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsllm.config.train import LogConfig
from dsllm.engine.processes.process_group import World
from dsllm.engine.step import StepResult
from dsllm.run_directory import LAYER_STATISTICS_FILE, METRICS_FILE, TENSORBOARD, read_metrics
from dsllm.session.progress import Progress
from dsllm.train.metrics import Metrics, RowFile, Speed, duration, short, step_line
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_run

SPEED = Speed(flops_per_token=2e6, peak_flops=4e9, peak_origin="a test")


def metrics_in(directory: Path, lines: list[str], tensorboard: bool = False, peak: float = 4e9) -> Metrics:
    config = dataclasses.replace(tiny_run(), log=LogConfig(tensorboard=tensorboard))
    speed = dataclasses.replace(SPEED, peak_flops=peak)
    return Metrics(directory, config, speed, attempt=2, report=lines.append)


def result(loss: float = 2.0) -> StepResult:
    return StepResult(loss=loss, tokens=100, gradient_norm=0.5, applied=True, loss_scale=1.0)


def record(metrics: Metrics, steps: range, loss: float = 2.0) -> None:
    for step in steps:
        metrics.record(metrics.row(result(loss), Progress(step=step, tokens=100 * step), 1e-3, 0.25, 1.5))


def test_a_row_has_what_the_step_measured(tmp_path):
    metrics = metrics_in(tmp_path, [])
    rows = [metrics.row(result(), Progress(step=step, tokens=100 * step), 1e-3, seconds, 1.5)
            for step, seconds in ((1, 9.0), (2, 0.25), (3, 0.5))]  # fmt: skip
    row = rows[-1]
    assert (row["step"], row["tokens"], row["loss"], row["attempt"]) == (3, 300, 2.0, 2)
    assert row["tokens_per_second"] == 200 and row["mfu"] == pytest.approx(200 * 2e6 / 4e9)
    assert row["eta_seconds"] == 0.5 * (20 - 3), "the median, which a slow first step does not move"
    assert metrics_in(tmp_path, [], peak=0).row(result(), Progress(step=1), 1e-3, 1.0, 0.0)["mfu"] is None


def test_rows_are_on_the_disk_at_once_and_a_cut_line_is_ended(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    metrics = metrics_in(tmp_path, lines := [])
    metrics.open(1)
    record(metrics, range(2, 4))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]  # not closed yet
    metrics.close()
    assert (tmp_path / METRICS_FILE).read_text().count("\n") == 4 and not lines


def test_a_number_that_is_not_finite_becomes_null(tmp_path):
    metrics = metrics_in(tmp_path, [])
    metrics.open(0)
    record(metrics, range(1, 2), loss=math.nan)
    metrics.record_layers(1, [{"layer": "embed", "largest": math.inf, "mean": 1.0}])
    metrics.record_layers(2, [])
    metrics.close()
    assert read_metrics(tmp_path)[0]["loss"] is None
    (line,) = (tmp_path / LAYER_STATISTICS_FILE).read_text().splitlines()
    assert json.loads(line) == {"step": 1, "layer": "embed", "largest": None, "mean": 1.0, "attempt": 2}


def points(directory: Path) -> dict[int, float]:
    board = EventAccumulator(str(directory / TENSORBOARD)).Reload()
    return {event.step: event.value for event in board.Scalars("loss")}


def test_tensorboard_keeps_the_point_of_the_step_that_a_run_resumes_from(tmp_path):
    """The first attempt reached step 5 and had saved step 3: points 4 and 5 are replaced, point 3 stays."""
    for first, stop, loss in ((1, 6, 1.0), (4, 8, 2.0)):
        metrics = metrics_in(tmp_path, lines := [], tensorboard=True)
        metrics.open(first - 1)
        record(metrics, range(first, stop), loss)
        metrics.close()
        assert not lines
    assert points(tmp_path) == {1: 1.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: 2.0, 6: 2.0, 7: 2.0}


def test_a_file_in_the_way_switches_tensorboard_off(tmp_path):
    (tmp_path / TENSORBOARD).write_text("in the way")
    metrics = metrics_in(tmp_path, lines := [], tensorboard=True)
    metrics.open(0)
    record(metrics, range(1, 3))
    metrics.close()
    (line,) = lines
    assert line.startswith("TensorBoard is switched off: ") and "tensorboard" in line
    assert len(read_metrics(tmp_path)) == 2


LIMIT = 2000
"""Bytes beyond which no file can be written: it stands in for a full disk."""


def on_a_full_disk(world: World, directory: Path) -> tuple[list[str], list[str]]:
    """Rows until the file is full, then more after some space has come: what was reported, and where the rows are."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    file = RowFile(directory / METRICS_FILE, (lines := []).append)
    file.open()
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
    for step in range(1, 201):
        if step == 151:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        file.append([{"step": step, "loss": 1.0}])
    file.close()
    return lines, [str(row["step"]) for row in read_metrics(directory)]


def test_rows_wait_in_memory_while_the_disk_is_full(tmp_path):
    ((lines, steps),) = run_ranks(1, on_a_full_disk, tmp_path)
    path = tmp_path / METRICS_FILE
    assert lines == [
        f"{path}: cannot be written, its rows wait in memory: File too large", f"{path}: can be written again",
    ]  # fmt: skip
    assert steps == [str(step) for step in range(1, 201)]
    assert path.read_text().count("\n") == 200, "no line was begun twice"


def on_a_disk_that_stays_full(world: World, directory: Path) -> tuple[list[str], int]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
    file = RowFile(directory / METRICS_FILE, (lines := []).append)
    for step in range(1, 201):
        file.append([{"step": step, "loss": 1.0}])
    file.close()
    return lines, len(read_metrics(directory))


def test_rows_that_never_fit_are_counted_at_the_end(tmp_path):
    ((lines, written),) = run_ranks(1, on_a_disk_that_stays_full, tmp_path)
    assert lines[0] == f"{tmp_path / METRICS_FILE}: cannot be written, its rows wait in memory: File too large"
    assert 10 < written < 150
    assert lines[1:] == [
        f"{tmp_path / METRICS_FILE}: {200 - written} rows are missing, because the disk did not take them until the end"
    ]


def test_waiting_rows_do_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("dsllm.train.metrics._MOST_WAITING_BYTES", 1000)
    (tmp_path / METRICS_FILE).mkdir()
    file = RowFile(tmp_path / METRICS_FILE, [].append)
    for step in range(1, 1001):
        file.append([{"step": step, "loss": 1.0}])
    (tmp_path / METRICS_FILE).rmdir()
    file.append([{"step": 1001, "loss": 1.0}])
    file.close()
    steps = [row["step"] for row in read_metrics(tmp_path)]
    assert 10 < len(steps) < 50 and steps == list(range(1002 - len(steps), 1002)), "the newest ones"


def boards_on_a_full_disk(world: World, directory: Path) -> list[str]:
    """What is reported when TensorBoard's file cannot grow."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    metrics = metrics_in(directory, lines := [], tensorboard=True)
    metrics.open(0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    record(metrics, range(1, 30))
    metrics.close()
    return lines


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_on_a_full_disk_is_switched_off(tmp_path):
    (lines,) = run_ranks(1, boards_on_a_full_disk, tmp_path)
    rows = str(tmp_path / METRICS_FILE)  # one line at the beginning, one at the end
    assert sorted(line.partition(": ")[0] for line in lines) == [rows, rows, "TensorBoard is switched off"]


def test_a_file_of_rows_that_cannot_be_opened(tmp_path):
    (tmp_path / "rows").mkdir()
    file = RowFile(tmp_path / "rows", (lines := []).append)
    with pytest.raises(IsADirectoryError):
        file.open()
    file.append([{"step": 1}])
    file.append([{"step": 2}])
    assert lines == [f"{tmp_path / 'rows'}: cannot be written, its rows wait in memory: Is a directory"]
    file.close()
    assert lines[1:] == [f"{tmp_path / 'rows'}: 2 rows are missing, because the disk did not take them until the end"]


def test_the_line_on_the_terminal(tmp_path):
    metrics = metrics_in(tmp_path, [])
    row = metrics.row(result(), Progress(step=3, tokens=1234, skipped_steps=2), 1e-3, 0.5, 1.5)
    line = step_line(row | {"loss_scale": 1024.0}, metrics.config)
    assert line == (
        "step 3/20  tokens 1.23k/2.56k  loss 2.0000  grad 0.500  lr 1.00e-03  200 tok/s  MFU 10.0%  scale 1024  "
        "skipped 2  1.50 GiB  ETA 8s"
    )


@pytest.mark.parametrize(
    ("count", "text"), [(7, "7"), (1234, "1.23k"), (3.4e6, "3.4M"), (5.6e9, "5.6B"), (1e13, "10T")]
)
def test_counts(count, text):
    assert short(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(6.6, "7s"), (306, "5m06s"), (3 * 3600 + 240, "3h04m"), (86400 + 7200, "1d02h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
