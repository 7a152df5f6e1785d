"""The append-only CSV file of a grid search."""

from __future__ import annotations

import csv
import math
import os
from dataclasses import dataclass
from pathlib import Path

from effnet_fast.scaling.compound import CompoundScaling

COLUMNS = (
    *("alpha", "beta", "gamma", "phi", "scorer", "score"),
    *("parameters", "macs", "resolution"),
)


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

    A last line without its end, which a kill in the middle of a write leaves, is cut off.

    Args:
        path: the file, made where there is none; None keeps nothing.
        scorer: whose trials these are.

    Raises:
        ValueError: the file holds something else, or trials of another scorer.
        OSError: it can be neither read and written nor made.
    """

    def __init__(self, path: str | Path | None, scorer: str) -> None:
        self.path = None if path is None else Path(path)
        self.trials: list[Trial] = []
        if self.path is None:
            return
        if self.path.exists() and self.path.stat().st_size:
            self._read(scorer)
        else:
            self._write(list(COLUMNS))

    def append(self, trial: Trial) -> None:
        """Adds a trial."""
        self.trials.append(trial)
        if self.path is not None:
            self._write(trial.row())

    def _write(self, row: list[str]) -> None:
        assert self.path is not None
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
            file.flush()
            os.fsync(file.fileno())

    def _read(self, scorer: str) -> None:
        assert self.path is not None
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            header, *rows = list(csv.reader(whole.decode("utf-8").splitlines())) or [[]]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{self.path} is not a file of trials: {error}") from error
        if tuple(header) != COLUMNS:
            raise ValueError(
                f"{self.path} is not a file of trials: its first line is not {','.join(COLUMNS)}"
            )
        for number, row in enumerate(rows, 2):
            try:
                trial = _parse(row)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{self.path}, line {number}: {error}") from error
            if trial.scorer != scorer:
                raise ValueError(
                    f"{self.path}, line {number}: scored by {trial.scorer}, not by {scorer}"
                )
            self.trials.append(trial)
        with self.path.open("r+b") as file:  # also where nothing is cut: it must be writable
            file.truncate(len(whole))


def _parse(row: list[str]) -> Trial:
    if len(row) != len(COLUMNS):
        raise ValueError(f"{len(row)} fields instead of {len(COLUMNS)}")
    alpha, beta, gamma, phi = map(float, row[:4])
    score = float(row[5])
    if not math.isfinite(score):
        raise ValueError(f"the score {row[5]} is no finite number")
    return Trial(CompoundScaling(alpha, beta, gamma), phi, row[4], score, *map(int, row[6:]))
