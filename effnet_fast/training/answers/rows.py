"""Answers of a network on a batch of images, and what a row of a file of answers holds."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
UNDECODABLE = 0xDC80
ESCAPED = re.compile(r"[\\\ud800-\udfff]")  # surrogates have no UTF-8
# A path with what becomes an escape, or with what looks like one.
SPECIAL = re.compile(r"[\ud800-\udfff]|\\x[0-9a-f]{2}|\\u[0-9a-f]{4}")


@dataclass(frozen=True)
class Answers:
    """What a network says of N images, M of which could be read.

    Args:
        indices: of the images in their list [N].
        labels: their own classes [N]; -1 where they are not known.
        reasons: why each could not be read, None where it could [N].
        classes: int64 [M,K], the likeliest first; with embeddings K = 0.
        values: float32 [M,K] probabilities of these classes, or [M,D] pooled features.
        losses: float32 [M] cross entropy with the true classes; None where nobody asked for it.
    """

    indices: list[int]
    labels: list[int]
    reasons: list[str | None]
    classes: NDArray[np.int64]
    values: Floats
    losses: Floats | None = None

    @property
    def unreadable(self) -> int:
        """Images without an answer."""
        return len(self.indices) - len(self.values)

    def counted(self) -> tuple[list[int], NDArray[np.int64], Floats, Floats | None]:
        """What `metrics.Tally.add` takes of answers with classes."""
        rows = zip(self.labels, self.reasons, strict=True)
        labels = [label for label, reason in rows if reason is None]
        return labels, self.classes, self.values[:, 0], self.losses

    def places(self) -> Iterator[tuple[int, str | None, int | None]]:
        """Of each image its index, its reason, and its place in `values`, None without one."""
        place = 0
        for index, reason in zip(self.indices, self.reasons, strict=True):
            yield index, reason, None if reason is not None else place
            place += reason is None


def shown(path: str) -> str:
    r"""A path as files of answers hold it: no two paths have the same text.

    Bytes that are no UTF-8 become escapes, \xff. In a path with such bytes, or with the text of
    such an escape, backslashes become \x5c.
    """
    if SPECIAL.search(path) is None:
        return path  # itself, not a copy: there may be millions
    return ESCAPED.sub(_escape, path)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if UNDECODABLE <= code < UNDECODABLE + 0x80:  # as os.fsdecode keeps the bytes 0x80 to 0xff
        code += 0x80 - UNDECODABLE
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


@dataclass(frozen=True)
class Columns:
    """The columns of a file of answers: a path, a reason, and the answer.

    Args:
        top: number of classes per row; 0 for embeddings.
        features: length of an embedding; 0 for classes.
        labels: names of all classes; None where they are not known.
    """

    top: int
    features: int
    labels: Sequence[str] | None

    def names(self) -> list[str]:
        """The columns of CSV and, without embeddings, of Parquet."""
        ranks = range(1, self.top + 1)
        of_classes = [f"{kind}_{i}" for i in ranks for kind in ("class", "label", "probability")]
        return ["path", "reason", *of_classes, *(f"feature_{i}" for i in range(self.features))]

    def label(self, index: int) -> str | None:
        """The name of a class, where it is known."""
        return self.labels[index] if self.labels else None


def csv_header(columns: Columns) -> bytes:
    """The first line."""
    return _csv_lines([columns.names()])


def csv_rows(columns: Columns, paths: Sequence[str], answers: Answers) -> bytes:
    """Rows of a CSV file; unreadable images have empty cells after the reason."""
    texts = answers.values.astype(str)
    empty = [""] * (3 * columns.top + columns.features)
    rows = []
    for path, (_, reason, place) in zip(paths, answers.places(), strict=True):
        cells = empty
        if place is not None and columns.features:
            cells = texts[place].tolist()
        elif place is not None:
            pairs = zip(answers.classes[place].tolist(), texts[place].tolist(), strict=True)
            cells = [cell for c, p in pairs for cell in (str(c), columns.label(c) or "", p)]
        rows.append([shown(path), reason or "", *cells])
    return _csv_lines(rows)


def _csv_lines(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8")


def csv_path(line: bytes) -> str:
    """The path of a row."""
    return next(csv.reader(io.StringIO(line.decode("utf-8"), newline="")))[0]


def json_rows(columns: Columns, paths: Sequence[str], answers: Answers) -> bytes:
    """Lines of JSON: path, reason, and top (as `effnet-fast classify --json`) or features."""
    kind = "features" if columns.features else "top"
    lines = []
    for path, (_, reason, place) in zip(paths, answers.places(), strict=True):
        row: dict[str, Any] = {"path": shown(path), "reason": reason, kind: None}
        if place is not None:
            values = [_number(text) for text in answers.values[place].astype(str).tolist()]
            row[kind] = values
            if not columns.features:
                classes = answers.classes[place].tolist()
                row[kind] = [
                    {"class": c, "label": columns.label(c), "probability": p}
                    for c, p in zip(classes, values, strict=True)
                ]
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines).encode("utf-8")


def _number(text: str) -> float | None:
    """The shortest number that is this float32; None for NaN and Infinity, which JSON lacks."""
    value = float(text)
    return value if np.isfinite(value) else None


def json_path(line: bytes) -> str:
    """The path of a row."""
    return str(json.loads(line)["path"])
