"""Options of a run, each written once: as a field with its default, what it may hold, and its text.

Python's arguments, the command line, recipes' files and the documents take them from there.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

LARGEST_COUNT = 2**31 - 1
WIDTH = 100  # of the documentation's lines
Class = TypeVar("Class", bound=type)


@dataclass(frozen=True)
class Rule:
    """What an option may hold.

    Args:
        holds: whether it may be a value.
        words: what it may be, in an error.
        read: makes a value of the command line's text; bool for a flag.
        choices: all values, where there are few.
        count: numbers of one value.
    """

    holds: Callable[[Any], bool]
    words: str
    read: Callable[[str], Any] = float
    choices: tuple[str, ...] = ()
    count: int = 1

    def or_none(self) -> Rule:
        """The same, or None."""
        holds = self.holds
        return Rule(lambda v: v is None or holds(v), self.words, self.read, self.choices)


@dataclass(frozen=True)
class Option:
    """The text and the rule of a field."""

    text: str
    rule: Rule


def option(default: Any, text: str, rule: Rule) -> Any:
    """A field of a dataclass of options."""
    return field(default=default, metadata={"option": Option(text, rule)})


def options_of(table: Any) -> Mapping[str, Option]:
    """The options of a dataclass by name."""
    return {entry.name: entry.metadata["option"] for entry in fields(table)}


def check(given: Any) -> None:
    """Checks all fields.

    Raises:
        ValueError: one holds what its rule forbids; names the field, the value and what is allowed.
    """
    for name, entry in options_of(given).items():
        if not entry.rule.holds(value := getattr(given, name)):
            raise ValueError(f"{name} must be {entry.rule.words}, got {value!r}")


def documented(table: Class) -> Class:
    """Adds the texts of its fields to a class's documentation."""
    lines = []
    for name, entry in options_of(table).items():
        text = textwrap.fill(f"{name}: {entry.text}.", WIDTH - 8, subsequent_indent="    ")
        lines.append(textwrap.indent(text, " " * 8))
    table.__doc__ = "\n".join([f"{table.__doc__}\n\n    Args:", *lines, "    "])
    return table


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def whole(least: int, most: int = LARGEST_COUNT, words: str = "") -> Rule:
    """Integers."""
    return Rule(
        lambda value: type(value) is int and least <= value <= most,
        words or f"an int of at least {least}",
        int,
    )


def one_of(names: tuple[str, ...]) -> Rule:
    """One of a few words."""
    return Rule(lambda value: value in names, f"one of {', '.join(names)}", str, names)


def pair(most: float = math.inf, words: str = "two rising numbers above 0") -> Rule:
    """A range."""

    def holds(value: Any) -> bool:
        return (
            isinstance(value, (list, tuple))
            and len(value) == 2
            and all(map(is_number, value))
            and 0 < value[0] <= value[1] <= most
        )

    return Rule(holds, words, count=2)


NOT_NEGATIVE = Rule(lambda v: is_number(v) and v >= 0, "a number of at least 0")
POSITIVE = Rule(lambda v: is_number(v) and v > 0, "a number above 0")
SHARE = Rule(lambda v: is_number(v) and 0 <= v <= 1, "a number between 0 and 1")
BELOW_ONE = Rule(lambda v: is_number(v) and 0 <= v < 1, "at least 0 and below 1")
RATIO = Rule(lambda v: is_number(v) and 0 < v <= 1, "above 0 and at most 1")
FLAG = Rule(lambda v: type(v) is bool, "true or false", bool)
TEXT = Rule(lambda v: isinstance(v, str), "a text", str)
