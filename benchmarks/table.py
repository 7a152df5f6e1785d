"""The table that ends a run: each contest in a line, this package beside the best peer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from benchmarks import report
from benchmarks.contest import OURS
from benchmarks.peers import PEERS
from benchmarks.records import Row
from benchmarks.targets import LIMITS_MS


@dataclass
class Held:
    """What a run found.

    Args:
        rows: of every contest that was held.
        absent: contestants that did not take part in a contest that they were to, and why.
        notes: lines below the table.
    """

    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


HELD = pytest.StashKey[Held]()
HEAD = ("what", "case", "mode", "dtype", "batch", "ours, ms", "best peer, ms", "ratio", "at most")
NOT_INSTALLED = "not installed"
INSTALL = "pip install '.[bench]' brings those of a CPU"


def lines(held: Held, full: bool) -> list[str]:
    """The table and what is not in it; `full` tells whether every contest was held."""
    found: dict[report.Contest, list[Row]] = {}
    for row in held.rows:
        found.setdefault(report.key(row), []).append(row)
    cells = [HEAD, *(_line(group) for group in found.values())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    text += ["", "Medians; a ratio below 1 takes less time than the best peer."]
    text += held.notes
    devices = {row.device for row in held.rows}
    if missing := [p.name for p in PEERS if devices.intersection(p.devices) and p.missing()]:
        text.append(f"Not installed, so not among the peers: {', '.join(missing)}; {INSTALL}")
    text += [f"{name} did not take part: {reason}" for name, reason in held.absent.items()
             if NOT_INSTALLED not in reason]  # fmt: skip
    if not full:
        text.append("Left to --full: compiled peers, other shapes and dtypes, growth.")
    return text


def _line(group: Iterable[Row]) -> tuple[str, ...]:
    rows = list(group)
    own = report.ours(rows)
    row = own or rows[0]
    peer = next((r for r in rows if r.contestant == row.best_peer), None)
    limit = LIMITS_MS.get((row.what, row.case)) if own else None
    form = own.contestant.removeprefix(OURS).strip("_") if own else ""
    return (
        *(row.what, row.case, row.mode, row.dtype, str(row.batch)),
        f"{report.figure(own.p50_ms)} {form}".strip() if own else "",
        f"{report.figure(peer.p50_ms)} {peer.contestant}" if peer else "",
        f"{own.ratio:.2f}" if own and own.ratio else "",
        "" if limit is None else f"{limit:g} ms",
    )
