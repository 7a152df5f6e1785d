"""Checks of users' numbers; the messages say what was given and what is allowed."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any


def positive(name: str, value: Any) -> float:
    """A real number above 0, infinity among them; numpy's are taken too.

    Raises:
        ValueError: anything else.
    """
    if not is_real(value) or not value > 0:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)


def whole(name: str, value: Any, least: int = 1) -> int:
    """An integer of at least `least`; numpy's are taken too.

    Raises:
        ValueError: anything else.
    """
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    return number


def is_real(value: Any) -> bool:
    """Whether it is a real number, of Python or numpy, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)
