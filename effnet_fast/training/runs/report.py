"""What a run came to: a table of its epochs, and curves."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from effnet_fast import files
from effnet_fast.training.extras import require
from effnet_fast.training.runs import logs, run_folder

FORMATS = (".png", ".svg")
CURVES = "curves.png"  # in the run's folder
# Columns of the table: of metrics.csv, their head, and how a number is written.
TABLE: dict[str, tuple[str, Callable[[float], str]]] = {
    "epoch": ("epoch", lambda v: f"{v:.0f}"),
    "train_loss": ("train loss", lambda v: f"{v:.4f}"),
    "loss": ("loss", lambda v: f"{v:.4f}"),
    "top1": ("top-1", lambda v: f"{v:.2%}"),
    "top5": ("top-5", lambda v: f"{v:.2%}"),
    "rate": ("rate", lambda v: f"{v:.2e}"),
    "images_per_second": ("images/s", lambda v: f"{v:.1f}"),
    "seconds": ("seconds", lambda v: f"{v:.1f}"),
    "memory_mb": ("MB", lambda v: f"{v:.0f}"),
}
# Panels of the figure: label of the axis, and the columns with their names in the legend.
PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("loss", {"train_loss": "training", "loss": "validation"}),
    ("accuracy (%)", {"top1": "top-1", "top5": "top-5"}),
    ("learning rate", {"rate": "rate"}),
    ("training images/s", {"images_per_second": "images/s"}),
)
PERCENT = ("top1", "top5")


def table_rows(history: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """A head and a row per epoch, as text; what there is no number of is "-"."""
    rows = [[head for head, _ in TABLE.values()]]
    for row in history:
        cells = [(row[name], write) for name, (_, write) in TABLE.items()]
        rows.append(["-" if math.isnan(value) else write(value) for value, write in cells])
    return rows


def read_history(run: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv; at least one.

    Raises:
        OSError, ValueError: it is not there, cannot be read, or has no rows yet.
    """
    path = Path(run) / run_folder.METRICS
    history = logs.read_metrics(path)
    if not history:
        raise ValueError(f"{path}: no epoch has ended yet")
    return history


def draw_curves(runs: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> None:
    """Draws the curves of runs beside one another, by matplotlib.

    Args:
        runs: folders.
        path: of the figure, .png or .svg.

    Raises:
        ImportError: matplotlib is not installed.
        OSError, ValueError: a run has no metrics; another suffix; the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: the figure must end in {' or '.join(FORMATS)}")
    histories = {os.fspath(run): read_history(run) for run in runs}
    # Without pyplot there is no choice of a window system, which may be missing.
    figure = require("matplotlib.figure", "train").Figure(figsize=(9.6, 7.2), layout="constrained")
    for ax, (label, columns) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for run, history in histories.items():
            for name, legend in columns.items():
                _draw_line(ax, history, name, legend if len(histories) == 1 else f"{run} {legend}")
        ax.set_xlabel("epoch")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend()
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower())


def _draw_line(ax: Any, history: list[dict[str, float]], name: str, legend: str) -> None:
    scale = 100.0 if name in PERCENT else 1.0
    points = [(row["epoch"], scale * row[name]) for row in history if not math.isnan(row[name])]
    if points:
        ax.plot(*zip(*points, strict=True), "o-", markersize=3, label=legend)
