"""The append-only CSV file of grid searches, which several processes may share."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from effnet_fast import files
from effnet_fast.scaling.compound import CompoundScaling

COLUMNS = (
    *("alpha", "beta", "gamma", "phi", "scorer", "score"),
    *("parameters", "macs", "resolution"),
)

FIRST_LINE = f"{','.join(COLUMNS)}\n".encode()
Key = tuple[CompoundScaling, float]  # the rule and phi


@dataclass(frozen=True)
class Trial:
    """A scored network.

    Args:
        scaling, phi: the rule, and the network's place on it.
        scorer: name of the scorer.
        score: larger is better.
        parameters, macs: of the network, for one image.
        resolution: side of the images, pixels.
    """

    scaling: CompoundScaling
    phi: float
    scorer: str
    score: float
    parameters: int
    macs: int
    resolution: int

    def row(self) -> list[str]:
        """Its fields in the order of `COLUMNS`, from which it can be read again exactly."""
        s = self.scaling
        numbers = [repr(float(value)) for value in (s.alpha, s.beta, s.gamma, self.phi)]
        sizes = [str(value) for value in (self.parameters, self.macs, self.resolution)]
        return [*numbers, self.scorer, repr(float(self.score)), *sizes]


class TrialFile:
    """Trials in a CSV file, each appended and written through as it ends.

    Searches in any number of threads and processes may share the file. Each reads and appends
    under the file's lock (flock), and claims a trial before running it; the claim is the lock of
    a hidden file beside the CSV, so it ends with its process. Without locks (on Windows, and on
    file systems that have none) one search at a time may use a file.

    A last line without its end, which a kill in the middle of a write leaves, is cut off.

    Args:
        path: the file, made where there is none; None keeps nothing.
        scorer: whose trials these are.

    Raises:
        ValueError: the file holds something else, or trials of another scorer; or the scorer's name
            is not one line of text.
        OSError: it can be neither read and written nor made.
    """

    def __init__(self, path: str | Path | None, scorer: str) -> None:
        if not scorer.isprintable():
            raise ValueError(f"the scorer's name must be one line of text, got {scorer!r}")
        self.path = None if path is None else Path(path)
        self.scorer = scorer
        self.trials: list[Trial] = []
        self._known: dict[Key, Trial] = {}
        self._claims: dict[Key, IO[bytes]] = {}
        self._forget()
        self.refresh()

    def _forget(self) -> None:
        self.trials.clear()
        self._known.clear()
        self._inode, self._offset, self._lines = 0, 0, 0  # of what has been read

    def find(self, key: Key) -> Trial | None:
        """The trial, if it had ended at the last `refresh` or `append`."""
        return self._known.get(key)

    def refresh(self) -> None:
        """Reads what has been appended since."""
        if self.path is not None:
            with self._locked():
                pass

    def append(self, trial: Trial) -> None:
        """Adds a trial."""
        if self.path is None:
            self._keep(trial)
            return
        with self._locked() as file:
            _write(file, trial.row())
            self._read(file)

    def claim(self, key: Key, *, wait: bool = False) -> bool:
        """Takes a trial for this search, until `release`; False where another search has it.

        Args:
            key: of the trial.
            wait: whether to wait for the other search. Who waits must hold no claim: the other
                may be waiting for it.
        """
        if self.path is None:
            return True
        path = self._claim_path(key)
        while True:
            file = path.open("ab")
            taken = files.lock(file, wait=wait)
            if taken is not False and files.is_at(file, path):
                self._claims[key] = file
                return True
            file.close()  # another has it, or has just given it back and removed the file
            if taken is False:
                return False

    def release(self, key: Key) -> None:
        """Gives a claim back."""
        file = self._claims.pop(key, None)
        if file is not None:
            with file, contextlib.suppress(FileNotFoundError):
                self._claim_path(key).unlink()
                files.unlock(file)

    def close(self) -> None:
        """Gives all claims back."""
        for key in list(self._claims):
            self.release(key)

    def _claim_path(self, key: Key) -> Path:
        assert self.path is not None
        digest = hashlib.sha256(repr((self.path.name, key)).encode()).hexdigest()[:32]
        return self.path.with_name(f".effnet-fast-{digest}.running")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        """The file, locked and read to its end, to append to."""
        assert self.path is not None
        if self.path.exists():
            files.check_regular(self.path)
        try:
            while True:
                with self.path.open("a+b") as file:
                    files.lock(file)
                    if not files.is_at(file, self.path):  # it was replaced meanwhile
                        continue
                    try:
                        self._read(file)
                        yield file
                    finally:
                        files.unlock(file)
                    return
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from error

    def _read(self, file: IO[bytes]) -> None:
        """Reads what is new; writes the first line where there is none."""
        status = os.fstat(file.fileno())
        if status.st_ino != self._inode or status.st_size < self._offset:
            self._forget()
            self._inode = status.st_ino
        file.seek(self._offset)
        new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        if self._offset == 0 and not FIRST_LINE.startswith(new):
            self._check_first_line(whole)
        for row in self._rows(whole):
            self._lines += 1
            if self._lines > 1:
                self._keep(self._trial(row))
        self._offset += len(whole)
        if len(whole) < len(new):
            file.truncate(self._offset)
        if self._offset == 0:
            _write(file, list(COLUMNS))
            self._offset, self._lines = file.tell(), 1

    def _keep(self, trial: Trial) -> None:
        self.trials.append(trial)
        self._known[trial.scaling, trial.phi] = trial

    def _check_first_line(self, whole: bytes) -> None:
        first = next(iter(self._rows(whole)), [])
        if tuple(first) != COLUMNS:
            raise ValueError(
                f"{self.path} is not a file of trials: its first line is not {','.join(COLUMNS)}"
            )

    def _rows(self, content: bytes) -> list[list[str]]:
        try:
            return list(csv.reader(io.StringIO(content.decode("utf-8"), newline="")))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{self.path} is not a file of trials: {error}") from error

    def _trial(self, row: list[str]) -> Trial:
        try:
            trial = _parse(row)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path}, line {self._lines}: {error}") from error
        if trial.scorer != self.scorer:
            raise ValueError(
                f"{self.path}, line {self._lines}: scored by {trial.scorer}, not by {self.scorer}"
            )
        return trial


def _write(file: IO[bytes], row: list[str]) -> None:
    """Appends a line in one piece, through to the disk."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(row)
    file.seek(0, os.SEEK_END)
    file.write(text.getvalue().encode("utf-8"))
    file.flush()
    os.fsync(file.fileno())


def _parse(row: list[str]) -> Trial:
    if len(row) != len(COLUMNS):
        raise ValueError(f"{len(row)} fields instead of {len(COLUMNS)}")
    alpha, beta, gamma, phi = map(float, row[:4])
    score = float(row[5])
    if not math.isfinite(score):
        raise ValueError(f"the score {row[5]} is no finite number")
    return Trial(CompoundScaling(alpha, beta, gamma), phi, row[4], score, *map(int, row[6:]))
