"""Draws a run's loss curve from its metrics.jsonl."""

import io
from pathlib import Path

import numpy as np

from dsllm.errors import require
from dsllm.files import write_atomically
from dsllm.run_directory import LOSS_PICTURE, read_metrics

_TRAINING, _VALIDATION = "#4c78a8", "#e45756"


def draw_loss_curve(directory: Path) -> Path:
    """Write RUN/loss.png: training loss, its running mean, and the held-out loss over tokens."""
    rows = [row for row in read_metrics(directory) if None not in (row.get("loss"), row.get("tokens"))]
    tokens, losses = [row["tokens"] for row in rows], [row["loss"] for row in rows]
    # matplotlib is needed at the end of a run only, and takes half a second to import
    figure = require("matplotlib.figure").Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens", ylabel="loss (nats per token)", title=directory.name)
    axes.plot(tokens, losses, color=_TRAINING, alpha=0.3, linewidth=0.8, label="training, each step")
    axes.plot(tokens, _running_mean(losses), color=_TRAINING, linewidth=1.6, label="training, running mean")
    held_out = [(row["tokens"], row["validation_loss"]) for row in rows if row.get("validation_loss") is not None]
    if held_out:
        line = "o-" if len(held_out) > 1 else "o"
        axes.plot(
            *zip(*held_out, strict=True), line, color=_VALIDATION, markersize=3.5, linewidth=1.2, label="held out"
        )
    axes.xaxis.set_major_formatter(require("matplotlib.ticker").EngFormatter(sep=""))  # 500k, 2M, 1T
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path, content = directory / LOSS_PICTURE, io.BytesIO()
    require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure).print_png(content)
    write_atomically(path, content.getvalue())
    return path


def _running_mean(values: list[float]) -> np.ndarray:
    """Mean over a window of a fiftieth of the curve, cut off at both ends."""
    half = max(1, len(values) // 100)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    places = np.arange(len(values))
    first, stop = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[stop] - sums[first]) / (stop - first)
