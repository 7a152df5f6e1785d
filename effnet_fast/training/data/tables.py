"""Tables of paths and labels (CSV, Parquet), and lists of paths."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effnet_fast import files
from effnet_fast.training.data.folders import SPLITS, listed
from effnet_fast.training.extras import require

LARGEST_LABEL = 99_999  # without class names, whose number then follows from the labels
PATH, LABEL, SPLIT = "path", "label", "split"


def read(
    table: Path, split: str | None, classes: Sequence[str] | None
) -> tuple[list[str], list[int] | None, list[str] | None]:
    """Paths, labels and classes of a table.

    Args:
        table: .csv, .parquet, or a .txt with a path per line; paths are relative to its folder.
        split: takes the rows whose column "split" has this name, where there is such a column.
        classes: the known classes; None makes them from the labels.

    Returns:
        Paths; labels, or None where there is no such column; classes in the order of their labels.

    Raises:
        OSError: it cannot be opened.
        ValueError: no column "path"; a row without a path or label; a label that is no class.
        ImportError: Parquet without pyarrow.
    """
    if table.suffix == ".txt":
        columns: dict[str, list[Any]] = {
            PATH: [line for line in files.read_text(table).split("\n") if line.strip()]
        }
    else:
        columns = _read_csv(table) if table.suffix == ".csv" else _read_parquet(table)
    if PATH not in columns:
        raise ValueError(
            f"{table}: needs the columns {PATH} and {LABEL}, has {listed(list(columns))}"
        )
    rows = list(range(len(columns[PATH])))
    if split is not None and SPLIT in columns:
        rows = [row for row in rows if columns[SPLIT][row] in SPLITS[split]]
    for row in rows:
        if not columns[PATH][row]:
            raise ValueError(f"{table}: row {row + 1} has no path")
    paths = [os.path.join(table.parent, str(columns[PATH][row])) for row in rows]
    if LABEL not in columns:
        return paths, None, None if classes is None else list(classes)
    found = [(f"row {row + 1}", columns[LABEL][row]) for row in rows]
    if classes is None:
        # Of all rows: the classes of a table do not depend on the split.
        classes = make_classes(str(table), columns[LABEL])
    return paths, numbers(str(table), found, classes), list(classes)


def _read_csv(table: Path) -> dict[str, list[Any]]:
    files.check_regular(table)
    with files.naming_file(table), open(table, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        try:
            names = [name.strip() for name in next(reader, [])]
            columns: dict[str, list[Any]] = {name: [] for name in names}
            for row in reader:
                if not row:
                    continue
                if len(row) != len(names):
                    raise ValueError(
                        f"line {reader.line_num} has {len(row)} fields, the header {len(names)}"
                    )
                for name, value in zip(names, row, strict=True):
                    columns[name].append(value.strip() if name != PATH else value)
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error
    return columns


def _read_parquet(table: Path) -> dict[str, list[Any]]:
    parquet = require("pyarrow.parquet", "train")
    files.check_regular(table)
    with files.naming_file(table):
        found = parquet.ParquetFile(table)
        names = [name for name in (PATH, LABEL, SPLIT) if name in found.schema_arrow.names]
        if PATH not in names:
            return {name: [] for name in found.schema_arrow.names}
        columns: dict[str, list[Any]] = found.read(columns=names).to_pydict()
    return columns


def _integer(value: Any) -> int | None:
    """A label that is a whole number, or None."""
    try:
        return int(str(value))
    except ValueError:
        return None


def make_classes(where: str, labels: Sequence[Any]) -> list[str]:
    """The classes of labels: their names, sorted, or "0", "1", ... up to the largest number.

    Raises:
        ValueError: a number below 0 or above LARGEST_LABEL; begins with `where`.
    """
    found = [_integer(label) for label in labels]
    whole = [number for number in found if number is not None]
    if len(whole) < len(found):
        return sorted({str(label) for label in labels if label not in (None, "")})
    for row, number in enumerate(whole):
        if not 0 <= number <= LARGEST_LABEL:
            raise ValueError(
                f"{where}: label {number} of image {row + 1} is out of range, allowed are 0 to "
                f"{LARGEST_LABEL}"
            )
    return [str(number) for number in range(max(whole, default=-1) + 1)]


def numbers(where: str, labels: Sequence[tuple[str, Any]], classes: Sequence[str]) -> list[int]:
    """Labels as indices of classes.

    Args:
        where: what errors begin with.
        labels: the place of each, for errors, and the label: a class's name, or its number from 0.
            Where all names are numbers, a number is a name: of "1", "2", "3", 1 is the first.
        classes: the names, in the order of their indices.

    Raises:
        ValueError: a label that is no class; numbers of which some are names and others are not.
    """
    known = {name: number for number, name in enumerate(classes)}
    values = _values(classes)
    found = []
    read: dict[str, Any] = {}  # a label that is a number, by what the number was taken for
    for place, label in labels:
        whole, number = _integer(label), known.get(str(label))
        if whole is not None:
            read["name" if number is not None else "index"] = label
        if number is None and whole is not None:
            number = whole if values is None else values.get(whole)
        if number is None or not 0 <= number < len(classes):
            order = f"0 to {len(classes) - 1} and " if values is None else ""
            raise ValueError(
                f"{where}: {place} has label {label!r}; allowed are {order}the classes' names: "
                f"{listed(classes)}"
            )
        found.append(number)
    if values is None and len(read) > 1:
        raise ValueError(
            f"{where}: label {read['name']!r} is the name of a class, and {read['index']!r} is "
            f"none: are they names or numbers from 0? The classes are {listed(classes)}"
        )
    return found


def _values(classes: Sequence[str]) -> dict[int, int] | None:
    """The classes by the numbers that are their names; None where those are not all numbers."""
    values = [_integer(name) for name in classes]
    if None in values or len(set(values)) < len(values):
        return None
    return {value: number for number, value in enumerate(values) if value is not None}
