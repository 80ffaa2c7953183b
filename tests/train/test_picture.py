"""The loss curve: its running mean, and which rows it needs."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsllm.run_directory import LOSS_PICTURE, METRICS_FILE
from dsllm.train.picture import _running_mean, draw_loss_curve

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("count", [99, 100, 250, 1001])
def test_the_running_mean_is_a_convolution_in_the_middle_and_shorter_at_the_ends(count):
    values = np.random.default_rng(0).normal(size=count)
    half = max(1, count // 100)
    window = np.ones(2 * half + 1) / (2 * half + 1)
    mean = _running_mean(values.tolist())
    assert len(mean) == count
    np.testing.assert_allclose(mean[half : count - half], np.convolve(values, window, mode="valid"), atol=1e-12)
    np.testing.assert_allclose(mean[0], values[: half + 1].mean(), atol=1e-12)
    np.testing.assert_allclose(mean[-1], values[-half - 1 :].mean(), atol=1e-12)


def test_the_running_mean_of_few_values():
    assert _running_mean([3.0]).tolist() == [3.0]
    assert _running_mean([1.0, 5.0]).tolist() == [3.0, 3.0]
    assert len(_running_mean([])) == 0


def write_rows(directory: Path, rows: list[dict], end: str = "") -> None:
    (directory / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


def test_a_curve_with_gaps_and_a_cut_last_line_is_drawn(tmp_path):
    rows = [{"step": step, "tokens": 10 * step, "loss": None if step == 3 else 1 / step} for step in range(1, 9)]
    rows[4]["validation_loss"] = 0.5
    write_rows(tmp_path, rows, end='{"step": 9, "to')
    assert draw_loss_curve(tmp_path) == tmp_path / LOSS_PICTURE
    assert (tmp_path / LOSS_PICTURE).read_bytes().startswith(PNG)


def test_a_run_without_a_finite_loss_has_an_empty_picture(tmp_path):
    write_rows(tmp_path, [{"step": 1, "tokens": 8, "loss": None}])
    assert draw_loss_curve(tmp_path).read_bytes().startswith(PNG)
