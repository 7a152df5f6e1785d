"""SVG figures of the results; the same rows give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks import growth
from benchmarks.contest import OURS
from benchmarks.limits import SILU_FLOPS
from benchmarks.records import Row

STYLE = {
    "svg.hashsalt": "effnet-fast",  # ids in the file would be random
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
STOCK = "torch_channels_last"
OURS_COLOR, STOCK_COLOR, PEER_COLOR = "#c0392b", "#7f8c8d", "#bdc3c7"


def draw(stem: str, rows: Sequence[Row]) -> dict[str, bytes]:
    """Every figure that there are rows for, by file name; `stem` begins the names."""
    figures: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
        "speedup": speedup,
        "throughput": throughput,
        "growth": growth_figure,
        "roofline": roofline,
        "memory": memory,
    }
    drawn = {}
    with mpl.rc_context(STYLE):
        for name, make in figures.items():
            figure = make(rows)
            if figure is not None:
                drawn[f"{stem}-{name}.svg"] = _svg(figure)
    return drawn


def _svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _bars(
    rows: Sequence[Row], value: Callable[[Row], float | None], label: str, better: str
) -> Figure | None:
    """Horizontal bars of every contestant, a panel for each contest of networks."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.what == "network" and value(row) is not None:
            name = f"{row.case.replace('_', ' at ')}, batch {row.batch}, {row.dtype}, {row.mode}"
            groups.setdefault(name, []).append(row)
    # Peers alone would say nothing of this package.
    groups = {n: g for n, g in groups.items() if any(r.contestant.startswith(OURS) for r in g)}
    if not groups:
        return None
    columns = 2
    lines = -(-len(groups) // columns)
    height = sum(
        0.8 + 0.19 * max(len(g) for g in list(groups.values())[i * columns : (i + 1) * columns])
        for i in range(lines)
    )
    figure = Figure(figsize=(10, height), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for panel in panels.flat[len(groups) :]:
        panel.axis("off")
    for panel, (name, group) in zip(panels.flat, groups.items(), strict=False):
        group = sorted(group, key=lambda row: value(row) or 0.0, reverse=better == "lower")
        values = [value(row) or 0.0 for row in group]
        panel.barh([row.contestant for row in group], values, color=[_color(r) for r in group])
        panel.bar_label(panel.containers[0], fmt="%.3g", padding=2, fontsize=7)
        panel.set_title(name, fontsize=9)
        panel.set_xlabel(f"{label} ({better} is better)", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.margins(x=0.12)
    return figure


def _color(row: Row) -> str:
    if row.contestant.startswith(OURS):
        return OURS_COLOR
    return STOCK_COLOR if row.contestant.startswith("torch") else PEER_COLOR


def speedup(rows: Sequence[Row]) -> Figure | None:
    """Speed of this package and of the best peer in multiples of PyTorch's, by contest."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.what == "network":
            network, _, side = row.case.rpartition("_")
            name = f"{network.capitalize()} at {side}, batch {row.batch}, {row.dtype}, {row.mode}"
            groups.setdefault(name, []).append(row)
    bars: list[tuple[str, float, float]] = []
    for name, group in groups.items():
        stock = [row.p50_ms for row in group if row.contestant == STOCK]
        own = [row.p50_ms for row in group if row.contestant.startswith(OURS)]
        peer = [row.p50_ms for row in group if row.contestant == row.best_peer]
        if stock and own and peer:
            bars.append((name, stock[0] / min(own), stock[0] / peer[0]))
    if not bars:
        return None
    names, fast, best = zip(*reversed(bars), strict=True)
    figure = Figure(figsize=(8, 0.6 + 0.42 * len(bars)), layout="constrained")
    panel = figure.subplots()
    for offset, values, color, label in (
        (0.2, fast, OURS_COLOR, "effnet-fast"),
        (-0.2, best, PEER_COLOR, "the best of the others"),
    ):
        panel.barh([i + offset for i in range(len(bars))], values, 0.38, color=color, label=label)
        panel.bar_label(panel.containers[-1], fmt="%.1f", padding=2, fontsize=7)
    panel.axvline(1.0, color=STOCK_COLOR, linewidth=1.2, label="PyTorch channels_last")
    panel.set_yticks(range(len(bars)), names, fontsize=8)
    panel.set_xlabel("speed in multiples of PyTorch's (higher is better)", fontsize=8)
    panel.legend(fontsize=8, loc="lower right")
    return figure


def throughput(rows: Sequence[Row]) -> Figure | None:
    """Images a second of every contestant."""
    return _bars(rows, lambda row: row.batch / row.p50_ms * 1e3, "images a second", "higher")


def memory(rows: Sequence[Row]) -> Figure | None:
    """Peak memory of every contestant."""
    return _bars(rows, lambda row: row.peak_mb, "peak memory, MB", "lower")


def growth_figure(rows: Sequence[Row]) -> Figure | None:
    """Time against batch, resolution and phi, with the fitted growth and the floor."""
    series = [s for s in growth.SERIES if any(row.what == growth.WHAT + s for row in rows)]
    if not series:
        return None
    figure = Figure(figsize=(3.6 * len(series), 3.2), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(series), squeeze=False)[0], series, strict=True):
        own = [row for row in rows if row.what == growth.WHAT + name]
        for contestant in dict.fromkeys(row.contestant for row in own):
            _plot_growth(panel, name, contestant, [r for r in own if r.contestant == contestant])
        points = sorted({(growth.position(row), row.floor_ms or 0.0) for row in own})
        panel.plot(*zip(*points, strict=True), color="black", linewidth=0.8, label="floor")
        panel.set(xscale="log", yscale="log", xlabel="2^phi" if name == "phi" else name)
        ticks = [x for x, _ in points]
        panel.set_xticks(ticks, [f"{x:.0f}" for x in ticks])
        panel.minorticks_off()
        panel.tick_params(labelsize=7)
        panel.set_ylabel("ms")
        panel.legend(fontsize=7)
    return figure


def _plot_growth(panel: Any, series: str, contestant: str, rows: Sequence[Row]) -> None:
    rows = sorted(rows, key=growth.position)
    x = [growth.position(row) for row in rows]
    times = [row.p50_ms for row in rows]
    label = contestant
    if len(rows) >= 3:
        label += f", exponent {growth.fit(series, contestant, rows).time:.2f}"
    panel.plot(x, times, "o-", color=_color(rows[0]), markersize=3, label=label)


def roofline(rows: Sequence[Row]) -> Figure | None:
    """Operations a second of each op against its operations per byte, under the machine's roof."""
    own = [
        row
        for row in rows
        if row.gbytes
        and row.contestant == OURS
        and row.dtype == "fp32"
        and "growth" not in row.what
    ]
    if not own:
        return None
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for what in dict.fromkeys(row.what for row in own):
        for mode, marker in (("inference", "o"), ("training", "^")):
            points = [row for row in own if (row.what, row.mode) == (what, mode)]
            if points:
                x = [_operations(row) / (row.gbytes or 1.0) for row in points]
                y = [_operations(row) / row.p50_ms * 1e3 for row in points]
                panel.plot(x, y, marker, markersize=4, label=f"{what}, {mode}")
    roof, slope = own[-1].limit_fma_gflops or 0.0, own[-1].limit_memory_gbs or 1.0
    edge = roof / slope
    panel.plot([0.1, edge, 1000], [0.1 * slope, roof, roof], color="black", linewidth=0.8)
    panel.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte (SiLU counted as multiply-adds)",
        ylabel="GFLOP/s",
        title=f"fp32; roof {roof:.0f} GFLOP/s, {slope:.0f} GB/s beyond the caches",
    )
    panel.legend(fontsize=7)
    return figure


def _operations(row: Row) -> float:
    """1e9 operations, SiLUs included."""
    return (row.gflops or 0.0) + SILU_FLOPS * (row.gsilus or 0.0)
