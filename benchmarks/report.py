"""Renders the results as Markdown tables and SVG figures: `python -m benchmarks.report`.

The report shows the latest run of each contest. Rows without a peer or a limit in their own run are
left out. The same CSV files give the same bytes: --check fails where the checked-in files differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import growth, held, records, targets
from benchmarks.contest import OURS
from benchmarks.records import ROOT, Row

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PAGE, FIGURES = Path("docs/benchmarks.md"), Path("docs/figures")
OPS = (
    "dwconv_bn_silu",
    "squeeze_excite",
    "pointwise_bn_act",
    "pointwise_bn_silu_pool",
    "stem_conv_bn_silu",
    "mbconv",
)
HELD = {f"network_{name}": isa.title for name, isa in held.ISAS.items()}
Contest = tuple[str, str, str, str, int]


def key(row: Row) -> Contest:
    """The contest that a row belongs to."""
    return (row.what, row.case, row.mode, row.dtype, row.batch)


def published(rows: Iterable[Row]) -> list[Row]:
    """The rows that have a peer and a limit beside them, of one run of each contest.

    Contests that are held to an instruction set have no limit. The run is the latest of those with
    the most contestants: one that was held with a few of them has another best peer.
    """
    rows = [
        row
        for row in rows
        if row.ratio is not None and (row.floor_share is not None or row.what in HELD)
    ]
    runs: dict[Contest, dict[str, int]] = {}
    for row in rows:
        sizes = runs.setdefault(key(row), {})
        sizes[row.date] = sizes.get(row.date, 0) + 1
    chosen = {
        contest: max(sizes, key=lambda date, sizes=sizes: (sizes[date], date))
        for contest, sizes in runs.items()
    }
    return [row for row in rows if chosen[key(row)] == row.date]


def contests(rows: Iterable[Row], whats: Sequence[str], mode: str) -> dict[Contest, list[Row]]:
    """The rows of these kinds and mode by contest, in the order of the file."""
    found: dict[Contest, list[Row]] = {}
    for row in rows:
        if row.what in whats and row.mode == mode:
            found.setdefault(key(row), []).append(row)
    return found


def ours(rows: Iterable[Row]) -> Row | None:
    """The fastest of this package's rows."""
    return min((r for r in rows if r.contestant.startswith(OURS)), key=_time, default=None)


def _time(row: Row) -> float:
    return row.p50_ms


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(rows: Sequence[Row]) -> str:
    """This package against the best peer, a line for each contest of networks."""
    lines = []
    for mode in ("inference", "training"):
        for group in contests(rows, ("network",), mode).values():
            own = ours(group)
            peer = next((r for r in group if r.contestant == r.best_peer), None)
            stock = next((r for r in group if r.contestant == "torch_channels_last"), None)
            if own is None or peer is None:
                continue
            lines.append(
                [
                    _network(own.case),
                    mode,
                    str(own.batch),
                    own.dtype,
                    figure(own.p50_ms),
                    figure(stock.p50_ms) if stock else "",
                    f"{own.p50_ms / stock.p50_ms:.2f}" if stock else "",
                    f"{figure(peer.p50_ms)} ({_contestant(peer)})",
                    f"{own.p50_ms / peer.p50_ms:.2f}",
                    f"{own.floor_share:.0%}",
                ]
            )
    head = ["network", "mode", "batch", "dtype", "effnet-fast, ms", "PyTorch channels_last, ms"]
    return table([*head, "ratio", "best peer, ms", "ratio", "share of floor"], lines)


def _network(case: str) -> str:
    name, _, side = case.rpartition("_")
    return f"{name.capitalize()} at {side}"


def _contestant(row: Row) -> str:
    return f"{row.contestant} {row.package}".strip()


def figure(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def all_contestants(rows: Sequence[Row], mode: str) -> str:
    """Every contestant's median in every contest of networks, the fastest first."""
    lines = []
    for group in contests(rows, ("network",), mode).values():
        for row in sorted(group, key=_time):
            peak = "" if row.peak_mb is None else f"{row.peak_mb:.0f}"
            lines.append(
                [
                    *(_network(row.case), str(row.batch), row.dtype, _contestant(row)),
                    *(figure(row.p20_ms), figure(row.p50_ms), figure(row.p80_ms)),
                    *(f"{row.ratio:.2f}", f"{row.floor_share:.0%}", peak),
                ]
            )
    head = ["network", "batch", "dtype", "contestant", "p20, ms", "p50, ms", "p80, ms"]
    return table([*head, "ratio to best peer", "share of floor", "peak memory, MB"], lines)


def held_to(rows: Sequence[Row], what: str) -> str:
    """Every contestant's median in every inference held to one instruction set."""
    lines = [
        [
            *(_network(row.case), str(row.batch), row.dtype, _contestant(row)),
            *(figure(row.p20_ms), figure(row.p50_ms), figure(row.p80_ms), f"{row.ratio:.2f}"),
        ]
        for group in contests(rows, (what,), "inference").values()
        for row in sorted(group, key=_time)
    ]
    head = ["network", "batch", "dtype", "contestant", "p20, ms", "p50, ms", "p80, ms"]
    return table([*head, "ratio to best peer"], lines)


def ops(rows: Sequence[Row], mode: str) -> str:
    """This package against the best peer, a line for each op and shape."""
    lines = []
    for group in contests(rows, OPS, mode).values():
        own = ours(group)
        if own is None:
            continue
        peer = next(r for r in group if r.contestant == r.best_peer)
        lines.append(
            [
                *(own.what, own.case, own.dtype, _us(own), f"{_us(peer)} ({peer.contestant})"),
                *(f"{own.ratio:.2f}", f"{own.floor_share:.0%}"),
            ]
        )
    head = ["op", "shape", "dtype", "effnet-fast, us", "best peer, us", "ratio", "share of floor"]
    return table(head, lines)


def _us(row: Row) -> str:
    return figure(row.p50_ms * 1e3)


def growths(rows: Sequence[Row]) -> list[growth.Growth]:
    """Fitted exponents of every series and contestant with enough points."""
    found = []
    for series in growth.SERIES:
        own = [row for row in rows if row.what == growth.WHAT + series]
        for contestant in dict.fromkeys(row.contestant for row in own):
            points = [row for row in own if row.contestant == contestant]
            if len(points) >= 3:
                found.append(growth.fit(series, contestant, points))
    return found


def growth_table(fits: Sequence[growth.Growth]) -> str:
    """The exponents, and what grows faster than what it has to do."""
    lines = [
        [
            *(g.series, g.contestant, f"{g.time:.2f}"),
            *("" if g.memory is None else f"{g.memory:.2f}", f"{g.flops:.2f}", f"{g.bytes:.2f}"),
            *(f"{g.spread:.2f}", " and ".join(g.faster_than) or "nothing"),
        ]
        for g in fits
    ]
    head = ["along", "contestant", "time", "memory", "FLOPs", "bytes", "worst factor from the fit"]
    return table([*head, "time grows faster than"], lines)


def conditions(rows: Sequence[Row]) -> str:
    """Machine and versions of the latest row with a limit, the limits and commits of all."""
    rows = [r for r in rows if r.floor_share is not None]
    row = max(rows, key=lambda r: r.date)
    limits = (
        f"{_span(r.limit_fma_gflops for r in rows)} GFLOP/s of fp32 multiply-adds and "
        f"{_span(r.limit_memory_gbs for r in rows)} GB/s of a large copy, measured in each run"
    )
    cuda = f", CUDA {row.cuda}, driver {row.driver}" if row.cuda else ""
    commits = ", ".join(sorted({r.commit[:7] for r in rows}))
    return (
        f"{row.machine}; {limits}; torch {row.torch}{cuda}, Python {row.python}; commits {commits}."
    )


def _span(values: Iterable[float]) -> str:
    found = sorted({round(value) for value in values})
    return f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"


def page(machine: str, rows: Sequence[Row], figures: Sequence[str]) -> str:
    """The section of one machine."""
    fits = growths(rows)
    parts = [f"## {machine}", conditions(rows), summary(rows)]
    parts += [f"![{Path(name).stem}](figures/{name})" for name in figures]
    for mode in ("inference", "training"):
        if contests(rows, ("network",), mode):
            parts += [f"### Networks, {mode}: every contestant", all_contestants(rows, mode)]
    for what, title in HELD.items():
        if found := contests(rows, (what,), "inference"):
            names = sorted({row.commit[:7] for group in found.values() for row in group})
            words = HELD_WORDS.format(title, ", ".join(names))
            parts += [f"### Networks, inference, held to {title}", words]
            parts += [held_to(rows, what)]
    for mode in ("inference", "training"):
        if contests(rows, OPS, mode):
            parts += [f"### Ops, {mode}", ops(rows, mode)]
    if fits:
        parts += ["### Growth", GROWTH_WORDS, growth_table(fits)]
    return "\n\n".join(parts)


GROWTH_WORDS = (
    "Exponents p of y ~ x^p, by least squares of the logarithms; along phi, of y ~ 2^(p phi). "
    f"Within {growth.MARGIN} two count as equal."
)
HELD_WORDS = (
    "All contestants are held to {0}, as on a CPU that has nothing newer: this package by its "
    "backend, OpenVINO and PyTorch by variables of the environment. OpenVINO takes part if the "
    "names of its kernels show that its convolutions and activations obey; its means over pixels "
    "and its classifier do not. ONNX Runtime cannot be held. Commits {1}."
)
WORDS = (
    "# Benchmarks\n\n"
    "Written by `python -m benchmarks.report` from benchmarks/results/*.csv; not edited by hand."
    "\n\n"
    "Every figure has its peers and its limit beside it, from the same run. Times are medians of "
    "calls in alternating bursts. A ratio below 1 means less time than the best of the peers. The "
    "floor is the larger of two times: the fewest bytes over the rate of a copy of that size, and "
    "the operations, SiLUs included, over the rate of multiply-adds. Nothing is faster. Peak "
    "memory is the memory that a call in a thread of its own adds; engines that keep their memory "
    "between calls have no figure."
)


def render(results: Path, output: Path, readme: str) -> dict[Path, bytes]:
    """All files that the results give, by path: the page, the figures, the README.

    Args:
        results: folder of CSV files.
        output: the root that the paths start from.
        readme: the README's text, of which the part between the markers is replaced.

    Raises:
        ValueError: a CSV file or the README is not as it should be.
    """
    from benchmarks.figures import draw

    sections, summaries, files, every = [], [], {}, []
    for path in sorted(results.glob("*.csv")):
        rows = published(records.read(path))
        if not rows:
            continue
        every += rows
        drawn = draw(path.stem, [row for row in rows if row.floor_share is not None])
        files |= {output / FIGURES / name: content for name, content in drawn.items()}
        sections.append(page(rows[0].machine, rows, list(drawn)))
        summaries.append(f"{conditions(rows)}\n\n{summary(rows)}")
    if not any(row.device == "cuda" for row in every):
        sections.append(targets.section(table))
    files[output / PAGE] = ("\n\n".join([WORDS, *sections]) + "\n").encode()
    files[output / "README.md"] = _between(readme, "\n\n".join(summaries)).encode()
    return files


def _between(readme: str, text: str) -> str:
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the README has no part between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the files, or with --check tells whether they are what the results give."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder of CSV files")
    parser.add_argument("--output", type=Path, default=ROOT, help="root of docs/ and README.md")
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    arguments = parser.parse_args(argv)
    readme = (arguments.output / "README.md").read_text(encoding="utf-8")
    files = render(arguments.results, arguments.output, readme)
    differing = [p for p, c in files.items() if not p.exists() or p.read_bytes() != c]
    for path in differing:
        if not arguments.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[path])
        print(f"{'differs' if arguments.check else 'wrote'}: {path}")
    return 1 if arguments.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
