"""Files of answers that grow row by row, and that an interruption at any moment leaves whole.

A process alone appends rows to a CSV or JSON Lines file itself; a row that a kill cut short is
removed at the next start. Parquet files cannot grow, and several processes of torchrun share no
file: they write parts, whole files in the folder FILE.parts, which are joined into FILE at the
end, or at the next start. FILE.predict.json says what the rows were made with.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from effnet_fast import files
from effnet_fast.training.answers.rows import Answers, Columns
from effnet_fast.training.answers.table_files import FORMATS, Table

SUFFIXES = tuple(FORMATS)
SYNC_S = 5.0  # how often rows are written through to the disk
Description = dict[str, Any]


class Barrier(Protocol):
    """Where the processes of a run wait for each other."""

    def __call__(self) -> None: ...


def check_suffix(path: Path) -> None:
    """Refuses a file that is of no known format.

    Raises:
        ValueError: another suffix.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: the file must end in {', '.join(SUFFIXES)}")


class Output:
    """A file of answers, open for more rows; a context manager.

    Args:
        path: the file, made where there is none.
        columns: what its rows hold.
        description: what the rows were made with; a file with another one is refused.
        rank, world: this process's number, and how many write. All see the same file system.
        barrier: where they wait for each other; needed where world > 1.

    Attributes:
        done: the paths whose rows are there, as `rows.shown` gives them.

    Raises:
        ValueError: the file was made with something else, or by something else; another process
            writes it; another suffix.
        OSError: it cannot be read or written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        columns: Columns,
        description: Description,
        *,
        rank: int = 0,
        world: int = 1,
        barrier: Barrier = lambda: None,
    ) -> None:
        self.path = Path(path)
        check_suffix(self.path)
        self.description, self._barrier = description, barrier
        self._rank, self._is_alone = rank, world == 1
        self._table: Table = FORMATS[self.path.suffix.lower()](columns)
        self._parts = self.path.with_name(f"{self.path.name}.parts")
        self._lock: IO[bytes] | None = None
        self._file: IO[bytes] | None = None
        self._pending: list[tuple[Sequence[str], Answers]] = []
        self._since = time.monotonic()
        self.done: set[str] = set()

    def __enter__(self) -> Output:
        try:
            if self._rank == 0:
                self._take()
                self._check_description()
                self._settle()
            self._barrier()
            if self._rank and self.path.exists():
                self.done = set(self._table.paths(self.path))
            self._barrier()  # before which nobody makes a part
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
            elif self._pending:
                with contextlib.suppress(OSError):  # the error that is under way says more
                    self._write_part()
        finally:
            self.close()

    @property
    def descriptors(self) -> list[int]:
        """The files that a forked child has to close: with them it would hold the lock."""
        return [file.fileno() for file in (self._lock, self._file) if file is not None]

    def add(self, paths: Sequence[str], answers: Answers) -> None:
        """Writes the rows of a batch.

        Raises:
            OSError: they cannot be written; the disk may be full.
        """
        with self._naming():
            if not self._table.grows:
                self._pending.append((paths, answers))
                if self._table.is_part(sum(len(p) for p, _ in self._pending), self._since):
                    self._write_part()
                return
            if self._file is None:
                self._file = self._open()
            _write(self._file, self._table.rows(paths, answers))
            if time.monotonic() - self._since > SYNC_S:
                os.fsync(self._file.fileno())
                self._since = time.monotonic()

    def finish(self) -> None:
        """Writes what is pending; once all processes have, joins the parts."""
        with self._naming():
            if self._pending:
                self._write_part()
            if self._file is not None:
                os.fsync(self._file.fileno())
        self._barrier()
        if self._rank == 0 and self._parts.is_dir():
            self._settle()
        self._barrier()

    def close(self) -> None:
        """Closes the files and gives the lock back; rows that are pending are lost."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._lock is not None:
            with self._lock as file, contextlib.suppress(FileNotFoundError):
                self._lock_path.unlink()
                files.unlock(file)
            self._lock = None

    @property
    def _lock_path(self) -> Path:
        return self.path.with_name(f".{self.path.name}.lock")

    @property
    def _description_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.predict.json")

    def _take(self) -> None:
        """Takes the lock, which ends with the process."""
        if not self.path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path.parent))
        if self.path.exists():
            files.check_regular(self.path)
        while self._lock is None:
            with self._naming():
                file = self._lock_path.open("ab")
            if files.lock(file, wait=False) is False:
                file.close()
                raise ValueError(f"{self.path}: another process is writing it")
            if files.is_at(file, self._lock_path):
                self._lock = file
            else:  # its owner has just removed it
                file.close()

    def _check_description(self) -> None:
        """Compares what the file was made with; describes a new file."""
        path = self._description_path
        if not self.path.exists() and not self._parts.exists():
            with self._naming(), files.replacing(path) as temporary:
                temporary.write_text(json.dumps(self.description, indent=2) + "\n", "utf-8")
            return
        if not path.exists():
            raise ValueError(
                f"{self.path}: exists, and {path.name}, which says how predict made it, does not; "
                "give another file"
            )
        try:
            found = json.loads(files.read_text(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path}: not written by predict")
        for name, value in self.description.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{self.path}: was begun with {name} {_short(found.get(name))}, and now it is "
                    f"{_short(value)}; give another file"
                )

    def _settle(self) -> None:
        """Removes what a kill cut short, and joins parts whose rows the file does not have."""
        with self._naming():
            self.done = set()  # what the file has, whatever a caller has entered
            if self.path.exists():
                self._table.repair(self.path)
                self.done.update(self._table.paths(self.path))
            if not self._parts.is_dir():
                return
            left = []
            for part in sorted(self._parts.iterdir()):
                if part.suffix != self.path.suffix.lower():
                    continue  # begun, and never named
                self._table.repair(part)
                first = next(self._table.paths(part), None)
                # The join is whole or not at all: its first row tells.
                if first is not None and first not in self.done:
                    left.append(part)
            if left:
                self._join(left)
                for part in left:
                    self.done.update(self._table.paths(part))
            shutil.rmtree(self._parts)

    def _join(self, parts: list[Path]) -> None:
        """Puts the file with the rows of the parts behind its own into its place."""
        self._parts.mkdir(exist_ok=True)
        joined = self._parts / "joined.tmp"
        present = [self.path] if self.path.exists() else []
        self._table.join([*present, *parts], joined, self.description)
        with joined.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(joined, self.path)

    def _open(self) -> IO[bytes]:
        """The file to append to: the output, or this process's part of it."""
        path = self.path
        if not self._is_alone:
            self._parts.mkdir(exist_ok=True)
            path = self._parts / f"{uuid.uuid4().hex}{self.path.suffix.lower()}"
        file = path.open("ab", buffering=0)
        if file.tell() == 0:
            _write(file, self._table.header())
        return file

    def _write_part(self) -> None:
        self._parts.mkdir(exist_ok=True)
        name = self._parts / f"{time.time_ns():020d}-{uuid.uuid4().hex}"
        temporary = name.with_suffix(".tmp")
        self._table.write(self._pending, temporary, self.description)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, name.with_suffix(self.path.suffix.lower()))
        self._pending, self._since = [], time.monotonic()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Puts the file's name into errors of the system."""
        try:
            yield
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(error.errno, os.strerror(error.errno), str(self.path)) from error


def _write(file: IO[bytes], content: bytes) -> None:
    """Writes all of it; what is not buffered may be taken in pieces."""
    view = memoryview(content)
    while view:
        view = view[file.write(view) :]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
