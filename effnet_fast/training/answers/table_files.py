"""Files of rows whose first column is a path: CSV, JSON Lines and Parquet."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from effnet_fast.training import extras
from effnet_fast.training.answers import rows
from effnet_fast.training.answers.rows import Answers, Columns

PART_ROWS = 4096  # of a part of a Parquet file, and of its row groups: 20 MiB of B0's features
PART_S = 10.0  # after which a part is written however short it is: a kill loses no more
METADATA = b"effnet_fast.predict"
Pending = Sequence[tuple[Sequence[str], Answers]]


class Table(Protocol):
    """A format of files.

    Attributes:
        grows: whether rows can be appended to a file; else whole parts are written.
    """

    grows: bool

    def header(self) -> bytes:
        """What a file begins with that grows."""

    def rows(self, paths: Sequence[str], answers: Answers) -> bytes:
        """What a batch appends."""

    def paths(self, path: Path) -> Iterator[str]:
        """The paths of a file's rows, in order, with little memory."""

    def repair(self, path: Path) -> None:
        """Removes what a kill has left unfinished.

        Raises:
            ValueError: the file has other columns.
        """

    def join(self, sources: list[Path], target: Path, description: dict[str, Any]) -> None:
        """Writes the rows of several files into a new one."""

    def is_part(self, count: int, since: float) -> bool:
        """Whether so many rows, pending since then (monotonic, s), are worth a part."""

    def write(self, pending: Pending, target: Path, description: dict[str, Any]) -> None:
        """Writes batches into a new file."""


class _Lines:
    """Text of a row per line; quotes may enclose line ends."""

    grows = True

    def __init__(
        self,
        header: bytes,
        encode: Callable[[Sequence[str], Answers], bytes],
        path_of: Callable[[bytes], str],
        quotes: bool,
    ) -> None:
        self._header, self.rows, self._path_of = header, encode, path_of
        self._quotes = quotes

    def header(self) -> bytes:
        return self._header

    def _whole_rows(self, file: IO[bytes]) -> Iterator[bytes]:
        """The rows that end in the file, with their ends."""
        row = b""
        for line in file:
            row += line
            if row.endswith(b"\n") and not (self._quotes and row.count(b'"') % 2):
                yield row
                row = b""

    def paths(self, path: Path) -> Iterator[str]:
        with path.open("rb") as file:
            file.seek(len(self._header))
            for number, row in enumerate(self._whole_rows(file), 1):
                try:
                    yield self._path_of(row)
                except (ValueError, KeyError, TypeError, IndexError) as error:
                    raise ValueError(f"{path}, row {number}: not written by predict") from error

    def repair(self, path: Path) -> None:
        with path.open("rb+") as file:
            start = file.read(len(self._header))
            if start != self._header:
                if not self._header.startswith(start):
                    raise ValueError(f"{path}: its first line is not that of such a file")
                file.seek(0)
                file.truncate()
                file.write(self._header)
                return
            end = len(self._header) + sum(map(len, self._whole_rows(file)))
            if end < file.seek(0, os.SEEK_END):
                file.truncate(end)

    def join(self, sources: list[Path], target: Path, description: dict[str, Any]) -> None:
        with target.open("wb") as file:
            file.write(self._header)
            for source in sources:
                with source.open("rb") as part:
                    part.seek(len(self._header))
                    shutil.copyfileobj(part, file)

    def is_part(self, count: int, since: float) -> bool:
        return False

    def write(self, pending: Pending, target: Path, description: dict[str, Any]) -> None:
        with target.open("wb") as file:
            file.write(self._header + b"".join(self.rows(*batch) for batch in pending))


class _Parquet:
    """Parquet, by pyarrow; the description stands in the file's metadata too."""

    grows = False

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._pa = extras.require("pyarrow", "predict")
        self._pq = extras.require("pyarrow.parquet", "predict")

    def header(self) -> bytes:
        return b""

    def rows(self, paths: Sequence[str], answers: Answers) -> bytes:
        raise NotImplementedError("a Parquet file does not grow")

    def _schema(self, description: dict[str, Any]) -> Any:
        pa = self._pa
        kinds = {"class": pa.int32(), "probability": pa.float32()}
        names = self._columns.names()
        if self._columns.features:
            names = ["path", "reason", "features"]
            kinds["features"] = pa.list_(pa.float32(), self._columns.features)
        fields = [(name, kinds.get(name.partition("_")[0], pa.string())) for name in names]
        return pa.schema(fields, {METADATA: json.dumps(description).encode()})

    def _table(self, paths: Sequence[str], answers: Answers, schema: Any) -> Any:
        pa, count = self._pa, len(answers.indices)
        places = [place for _, _, place in answers.places()]
        arrays = [
            pa.array([rows.shown(path) for path in paths], pa.string()),
            pa.array(answers.reasons, pa.string()),
        ]
        take = pa.array(places, pa.int64())  # None where there is no answer
        if self._columns.features:
            flat = pa.array(answers.values.reshape(-1), pa.float32())
            width = self._columns.features
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, width).take(take))
        for k in range(self._columns.top):
            classes = answers.classes[:, k]
            labels = [self._columns.label(int(c)) for c in classes]
            values = (
                pa.array(classes, pa.int32()),
                pa.array(labels, pa.string()),
                pa.array(answers.values[:, k], pa.float32()),
            )
            arrays += [array.take(take) for array in values]
        assert all(len(array) == count for array in arrays)
        return pa.Table.from_arrays(arrays, schema=schema)

    def paths(self, path: Path) -> Iterator[str]:
        with self._pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["path"]):
                yield from batch.column(0).to_pylist()

    def repair(self, path: Path) -> None:
        try:
            names = self._pq.read_schema(path).names
        except self._pa.ArrowInvalid as error:
            raise ValueError(f"{path}: not a Parquet file: {error}") from error
        if names != self._schema({}).names:
            raise ValueError(f"{path}: its columns are not those of such a file")

    def join(self, sources: list[Path], target: Path, description: dict[str, Any]) -> None:
        schema = self._schema(description)
        with self._pq.ParquetWriter(os.fspath(target), schema) as writer:
            held: list[Any] = []
            for source in sources:
                with self._pq.ParquetFile(source) as file:
                    for batch in file.iter_batches(PART_ROWS):
                        held.append(self._pa.Table.from_batches([batch]).cast(schema))
                        if sum(map(len, held)) >= PART_ROWS:
                            writer.write_table(self._pa.concat_tables(held))
                            held = []
            if held:
                writer.write_table(self._pa.concat_tables(held))

    def is_part(self, count: int, since: float) -> bool:
        return count >= PART_ROWS or time.monotonic() - since > PART_S

    def write(self, pending: Pending, target: Path, description: dict[str, Any]) -> None:
        schema = self._schema(description)
        tables = [self._table(paths, answers, schema) for paths, answers in pending]
        self._pq.write_table(self._pa.concat_tables(tables), os.fspath(target))


def _csv(columns: Columns) -> Table:
    def encode(paths: Sequence[str], answers: Answers) -> bytes:
        return rows.csv_rows(columns, paths, answers)

    return _Lines(rows.csv_header(columns), encode, rows.csv_path, quotes=True)


def _json_lines(columns: Columns) -> Table:
    def encode(paths: Sequence[str], answers: Answers) -> bytes:
        return rows.json_rows(columns, paths, answers)

    return _Lines(b"", encode, rows.json_path, quotes=False)


FORMATS: dict[str, Callable[[Columns], Table]] = {
    ".csv": _csv,
    ".parquet": _Parquet,
    ".jsonl": _json_lines,
}
