"""`--plot FILE`: figures by matplotlib, which the extra "plot" installs."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from effnet_fast import files
from effnet_fast.cli import common

FORMATS = (".svg", ".png")
LABELS = {
    "top1_estimate": "ImageNet top-1, estimate (%)",
    "memory_peak": "peak memory (MB)",
    "latency_s": "measured time (ms)",
}


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds --plot."""
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a figure, .svg or .png")


def check(arguments: argparse.Namespace) -> None:
    """Refuses a --plot that could not be drawn, before anything has been computed.

    Raises:
        CommandError: matplotlib is missing, the format is unknown, or the file cannot be written.
    """
    path = arguments.plot
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise common.CommandError(f"--plot {path}: the file must end in {' or '.join(FORMATS)}")
    common.check_writable("--plot", path)
    if importlib.util.find_spec("matplotlib") is None:
        raise common.CommandError(
            '--plot needs matplotlib: pip install "effnet-fast[plot]", or pip install matplotlib'
        )


def series(path: Path, report: dict[str, Any]) -> None:
    """Estimated accuracy, memory and measured time over multiply-adds, where there are such."""
    networks = report["networks"]
    plan = report["conditions"]["plan"]
    panels: dict[str, Any] = {}
    if any(n["top1_estimate"] is not None for n in networks):
        panels["top1_estimate"] = lambda n: n["top1_estimate"]
    panels["memory_peak"] = lambda n: n["memory_peak"] / 1e6
    if networks[0]["latency_s"]:
        panels["latency_s"] = lambda n: n["latency_s"][plan] * 1e3
    figure, axes = _figure(len(panels))
    for ax, (name, value) in zip(axes, panels.items(), strict=True):
        for label in dict.fromkeys(n["series"] for n in networks):
            own = [n for n in networks if n["series"] == label and value(n) is not None]
            ax.plot([n["macs"] / 1e9 for n in own], [value(n) for n in own], "o-", label=label)
        ax.set_xscale("log")
        ax.set_xlabel("multiply-adds (billions)")
        suffix = "" if name == "top1_estimate" else f", {plan}"
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


def table(path: Path, report: dict[str, Any]) -> None:
    """Multiply-adds and parameters over phi, of the published networks and of the rule's."""
    networks = sorted(report["networks"], key=lambda n: n["phi"])
    panels = {
        "multiply-adds (billions)": lambda n: n["macs"] / 1e9,
        "parameters (millions)": lambda n: n["params"] / 1e6,
    }
    figure, axes = _figure(len(panels))
    for ax, (label, value) in zip(axes, panels.items(), strict=True):
        for name, marker, key in (("published", "o", None), ("rule", "x--", "rule")):
            own = [(n["phi"], n.get(key) if key else n) for n in networks]
            shown = [(phi, value(n)) for phi, n in own if n is not None]
            if shown:
                name = name if key or "rule" in networks[0] else "rule"
                ax.plot(*zip(*shown, strict=True), marker, label=name)
        ax.set_yscale("log")
        ax.set_xlabel("phi")
        ax.set_ylabel(label)
        ax.legend()
    _save(figure, path)


def shares(path: Path, found: float, series: dict[str, list[tuple[float, float]]]) -> None:
    """What networks near the found phi use: by limit, pairs of phi and the share in use."""
    figure, (ax,) = _figure(1)
    for name, points in series.items():
        phis, used = zip(*points, strict=True)
        ax.plot(phis, [100 * share for share in used], drawstyle="steps-mid", label=name)
    ax.axhline(100.0, color="black", linewidth=0.8)
    ax.axvline(found, color="black", linewidth=0.8, linestyle=":", label=f"phi = {found:.3f}")
    ax.set_xlabel("phi")
    ax.set_ylabel("share of the limit (%)")
    ax.legend()
    _save(figure, path)


def _figure(panels: int) -> tuple[Any, Any]:
    # Without pyplot there is no choice of a window system, which may be missing.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * panels, 3.6), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _save(figure: Any, path: Path) -> None:
    with common.bad_input(OSError, ValueError), files.replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower())
