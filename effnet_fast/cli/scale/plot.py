"""`--plot FILE`: figures by matplotlib, which the extra "plot" installs."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from effnet_fast.cli import common

FORMATS = (".svg", ".png")
LABELS = {"top1_estimate": "ImageNet top-1, estimate (%)", "latency_s": "measured time (ms)"}


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds --plot."""
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a figure, .svg or .png")


def check(arguments: argparse.Namespace) -> None:
    """Refuses a --plot that could not be drawn, before anything has been computed.

    Raises:
        CommandError: matplotlib is missing, the format is unknown, or there is no such folder.
    """
    path = arguments.plot
    if path is None:
        return
    if path.suffix not in FORMATS:
        raise common.CommandError(f"--plot {path}: the file must end in {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise common.CommandError(f"--plot {path}: there is no folder {path.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise common.CommandError(
            '--plot needs matplotlib: pip install "effnet-fast[plot]", or pip install matplotlib'
        )


def series(path: Path, report: dict[str, Any]) -> None:
    """Estimated accuracy, and time where it was measured, over multiply-adds for each series."""
    networks = report["networks"]
    plan = report["conditions"]["plan"]
    panels: dict[str, Any] = {"top1_estimate": lambda n: n["top1_estimate"]}
    if networks[0]["latency_s"]:
        panels["latency_s"] = lambda n: n["latency_s"][plan] * 1e3
    figure, axes = _figure(len(panels))
    for ax, (name, value) in zip(axes, panels.items(), strict=True):
        for label in dict.fromkeys(n["series"] for n in networks):
            own = [n for n in networks if n["series"] == label]
            ax.plot([n["macs"] / 1e9 for n in own], [value(n) for n in own], "o-", label=label)
        ax.set_xscale("log")
        ax.set_xlabel("multiply-adds (billions)")
        suffix = f", {plan}" if name == "latency_s" else ""
        ax.set_ylabel(LABELS[name] + suffix)
        ax.legend()
    _save(figure, path)


def grid(path: Path, report: dict[str, Any]) -> None:
    """The score of every trial over each of the three constants."""
    figure, axes = _figure(3)
    for ax, name in zip(axes, ("alpha", "beta", "gamma"), strict=True):
        trials = report["trials"]
        ax.plot([t[name] for t in trials], [t["score"] for t in trials], "o", alpha=0.6)
        ax.set_xlabel(name)
        ax.set_ylabel(f"score ({report['scorer']})")
    _save(figure, path)


def _figure(panels: int) -> tuple[Any, Any]:
    # Without pyplot there is no choice of a window system, which may be missing.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * panels, 3.6), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _save(figure: Any, path: Path) -> None:
    with common.bad_input(OSError):
        figure.savefig(path)
