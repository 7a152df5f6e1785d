"""Exponents of growth, fitted to measured series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.records import Row

SERIES = ("batch", "resolution", "phi")
WHAT = "growth with "  # begins the name of these contests
MARGIN = 0.1  # of an exponent: what is within it of another grows as fast


@dataclass(frozen=True)
class Growth:
    """How a contestant grows along a series.

    Args:
        series, contestant: which.
        time, memory, flops, bytes: exponents p of y ~ x**p; along phi, of y ~ 2**(p * phi). None
            where there is no measurement.
        spread: largest factor between a time and the fit.
    """

    series: str
    contestant: str
    time: float
    memory: float | None
    flops: float
    bytes: float
    spread: float

    @property
    def faster_than(self) -> tuple[str, ...]:
        """What the time grows faster than, of "FLOPs" and "bytes"."""
        limits = {"FLOPs": self.flops, "bytes": self.bytes}
        return tuple(name for name, p in limits.items() if self.time > p + MARGIN)


def position(row: Row) -> float:
    """Where on its series a row lies; along phi on a scale of which equal steps double."""
    series = row.what.removeprefix(WHAT)
    if series == "batch":
        return float(row.batch)
    name, side = row.case.rsplit("_", 1)
    return float(side) if series == "resolution" else 2.0 ** float(name.removeprefix("phi"))


def fit(series: str, contestant: str, rows: Sequence[Row]) -> Growth:
    """Least squares of the logarithms.

    Raises:
        ValueError: fewer than three positions.
    """
    x = [position(row) for row in rows]
    if len(set(x)) < 3:
        raise ValueError(f"growth with {series} of {contestant} needs three points, got {len(x)}")

    def exponent(values: Sequence[float | None]) -> float | None:
        pairs = [(math.log(a), math.log(b)) for a, b in zip(x, values, strict=True) if b]
        return _slope(pairs)[0] if len(pairs) == len(x) else None

    times = [row.p50_ms for row in rows]
    slope, intercept = _slope([(math.log(a), math.log(b)) for a, b in zip(x, times, strict=True)])
    errors = [
        abs(math.log(t) - slope * math.log(a) - intercept) for a, t in zip(x, times, strict=True)
    ]
    return Growth(
        series,
        contestant,
        time=slope,
        memory=exponent([row.peak_mb for row in rows]),
        flops=exponent([row.gflops for row in rows]) or 0.0,
        bytes=exponent([row.gbytes for row in rows]) or 0.0,
        spread=math.exp(max(errors)),
    )


def _slope(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and intercept of the line through points, by least squares."""
    mean_x = sum(a for a, _ in pairs) / len(pairs)
    mean_y = sum(b for _, b in pairs) / len(pairs)
    across = sum((a - mean_x) ** 2 for a, _ in pairs)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in pairs) / across
    return slope, mean_y - slope * mean_x
