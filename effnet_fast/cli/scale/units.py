"""Amounts with units on the command line, and back into text."""

from __future__ import annotations

import argparse
import math
import re

COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
BYTES = {
    **{prefix + "B": factor for prefix, factor in COUNTS.items()},
    **{f"{prefix}IB": 1024.0**power for power, prefix in enumerate("KMGTP", 1)},
}
SECONDS = {"US": 1e-6, "MS": 1e-3, "S": 1.0}

_AMOUNT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?|[0-9]+\.)\s*([A-Za-z]*)\s*")


def parse_count(text: str) -> float:
    """An argparse type: "1.5G", "386M", "5e6"; K, M, G, T and P are powers of 1000."""
    return _parse(text, COUNTS, "a count such as 5000000, 386M or 1.5G")


def parse_bytes(text: str) -> float:
    """An argparse type: "8GiB", "500MB", bytes without a unit; KiB, MiB, ... are powers of 1024."""
    units = {"": 1.0, **BYTES}
    return _parse(text, units, "an amount of memory such as 8GiB, 500MB or 1048576")


def parse_seconds(text: str) -> float:
    """An argparse type: "15ms", "0.5s", "800us"; seconds."""
    return _parse(text, SECONDS, "a time such as 15ms, 0.5s or 800us")


def _parse(text: str, units: dict[str, float], wanted: str) -> float:
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    number, unit = match.groups()
    if unit.upper() not in units:
        problem = f"has the unknown unit {unit!r}" if unit else "has no unit"
        raise argparse.ArgumentTypeError(f"{text!r} {problem}: give {wanted}")
    amount = float(number) * units[unit.upper()]
    if not (math.isfinite(amount) and amount > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not positive and finite: give {wanted}")
    return amount


def format_count(amount: float) -> str:
    """Three digits and a power of 1000: 386M, 1.83G."""
    return _format(amount, [(factor, prefix) for prefix, factor in COUNTS.items()])


def format_bytes(amount: float) -> str:
    """Three digits and a power of 1000: 88.3 MB."""
    # The sign of 1000 is a small letter in the SI.
    return _format(amount, [(f, f" {p.replace('K', 'k')}B") for p, f in COUNTS.items()])


def format_seconds(amount: float) -> str:
    """Milliseconds with three digits."""
    return f"{_digits(amount * 1e3)} ms"


def _format(amount: float, units: list[tuple[float, str]]) -> str:
    # What rounds to 1000 of a unit is 1 of the next.
    factor, unit = max((u for u in units if abs(amount) >= 0.9995 * u[0]), default=units[0])
    return f"{_digits(amount / factor)}{unit}"


def _digits(value: float) -> str:
    """Three significant digits, without an exponent up to a million."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    if abs(rounded) >= 1e6:
        return f"{rounded:.3g}"
    places = 2 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:.{max(0, places)}f}"
