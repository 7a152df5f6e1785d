"""What a run tells of itself: metrics.csv, TensorBoard's files, and a line on a terminal."""

from __future__ import annotations

import csv
import importlib.util
import io
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from effnet_fast import files

# Of metrics.csv and of what the run returns; a row per epoch.
COLUMNS = (
    "epoch",  # epochs that have ended
    "step",  # steps of the optimizer so far
    "rate",  # learning rate of the last step, of the classifier
    "train_loss",  # mean over the images of the epoch, of the weights of each step
    "loss",  # mean cross entropy over the validation images
    "top1",
    "top5",
    "images_per_second",  # of training
    "seconds",  # of the epoch, its evaluation included
    "memory_mb",  # peak: of the device's tensors on CUDA, else of the process
    "unreadable",  # training images of the epoch that could not be read
)
REFRESH = 0.5  # seconds between two updates of the line


def write_metrics(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the rows of all epochs, whole or not at all.

    Numbers are written as Python reads them back: equal text is equal bits.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    with files.replacing(path) as file:
        file.write_text(text.getvalue(), encoding="utf-8")


def write_unreadable(reasons: Mapping[str, str], path: Path) -> None:
    """Writes the reasons by path of images that could not be read, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("path", "reason"), *sorted(reasons.items())])
    with files.replacing(path) as file:
        file.write_text(text.getvalue(), encoding="utf-8", errors="surrogateescape")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv; empty cells are NaN.

    Raises:
        OSError: it cannot be read.
        ValueError: other columns, or something that is no number.
    """
    with files.naming_file(path):
        reader = csv.DictReader(io.StringIO(files.read_text(path)))
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"the columns must be {', '.join(COLUMNS)}")
        return [{name: float(row[name] or "nan") for name in COLUMNS} for row in reader]


def memory_mb(device: torch.device) -> float:
    """Peak of the memory in use, in 10^6 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


class TensorBoard:
    """Writes TensorBoard's files where tensorboard is installed, and nothing elsewhere.

    Args:
        folder: of the files.
        step: the first one that will be written: what an interrupted run wrote beyond is hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._writer: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=step or None, flush_secs=30)

    def write(self, values: dict[str, float | None], step: int) -> None:
        """Adds numbers under their names."""
        if self._writer is not None:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Makes what was written visible."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Ends the files."""
        if self._writer is not None:
            self._writer.close()


class Progress:
    """A line on stderr: images/s, time to the end of the run, loss, rate and memory.

    Args:
        silent: whether nothing is shown.
        epochs: of the run.
        images: of an epoch, of all processes.
    """

    def __init__(self, *, silent: bool, epochs: int, images: int, device: torch.device) -> None:
        self.silent, self.epochs, self.images, self.device = silent, epochs, images, device
        self._bar: tqdm[Any] | None = None
        self._epoch, self._shown = 0, 0.0

    def begin(self, epoch: int, done: int) -> None:
        """A new line for an epoch, of which so many images are done."""
        self._epoch = epoch
        self._bar = tqdm(
            total=self.images,
            initial=done,
            desc=f"epoch {epoch + 1}/{self.epochs}",
            unit=" images",
            disable=self.silent,
            file=sys.stderr,
            leave=False,
            mininterval=REFRESH,
        )

    def update(self, images: int, loss: float, rate: float) -> None:
        """After a step."""
        bar = self._bar
        if bar is None or self.silent:
            return
        now = time.monotonic()
        if now - self._shown > REFRESH:  # reading the memory costs a call of the system
            self._shown = now
            speed = bar.format_dict["rate"] or 0.0
            left = (self.epochs - self._epoch) * self.images - bar.n
            until = tqdm.format_interval(left / speed) if speed else "?"
            bar.set_postfix_str(
                f"loss {loss:.4f}, rate {rate:.2e}, {memory_mb(self.device):.0f} MB, "
                f"run ends in {until}",
                refresh=False,
            )
        bar.update(images)

    def end(self) -> None:
        """Removes the line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
