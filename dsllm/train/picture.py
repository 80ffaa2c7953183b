"""Draws a run's loss curve from its metrics.jsonl."""

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dsllm.train.run_directory import METRICS_FILE

_TRAINING, _VALIDATION = "#4c78a8", "#e45756"


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, one per step: after a resume later rows win, and a line cut by a kill is left out."""
    rows: dict[int, dict[str, Any]] = {}
    for line in (directory / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows = {step: r for step, r in rows.items() if step < row["step"]} if row["step"] in rows else rows
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def draw_loss_curve(directory: Path) -> Path:
    """Write RUN/loss.png: training loss, its running mean, and the held-out loss over tokens."""
    rows = [row for row in read_metrics(directory) if row["loss"] is not None]
    tokens, losses = [row["tokens"] for row in rows], [row["loss"] for row in rows]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens", ylabel="loss (nats per token)", title=directory.name)
    axes.plot(tokens, losses, color=_TRAINING, alpha=0.3, linewidth=0.8, label="training, each step")
    axes.plot(tokens, _running_mean(losses), color=_TRAINING, linewidth=1.6, label="training, running mean")
    held_out = [(row["tokens"], row["validation_loss"]) for row in rows if row.get("validation_loss") is not None]
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), "o-", color=_VALIDATION, markersize=3.5, linewidth=1.2, label="held out"
        )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path = directory / "loss.png"
    FigureCanvasAgg(figure).print_png(str(path))
    return path


def _running_mean(values: list[float]) -> list[float]:
    """Mean over a window of a fiftieth of the curve."""
    half = max(1, len(values) // 100)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
