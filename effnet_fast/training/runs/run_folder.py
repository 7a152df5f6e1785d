"""The folder of a run: its lock, its description, its weights, and how they are loaded.

run.json            model, recipe, arguments, versions; the metrics once the run has ended
metrics.csv         a row per epoch
tensorboard/        the same and every step's loss, where tensorboard is installed
state.pt            all that a run continues from; gone once it has ended
model.safetensors   the final weights, class names and image preset
.lock               held by the process that trains
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from effnet_fast import files
from effnet_fast.models import EfficientNet
from effnet_fast.pretrained import images

WEIGHTS = "model.safetensors"
DESCRIPTION = "run.json"
METRICS = "metrics.csv"
UNREADABLE = "unreadable.csv"
STATE = "state.pt"
TENSORBOARD = "tensorboard"
LOCK = ".lock"
FAILED_BATCH = "failed_batch.pt"
FORMAT = 1  # of run.json and state.pt
PATIENCE = 10.0  # seconds for which a run that is resumed waits for the lock of one that dies

_held: weakref.WeakSet[Any] = weakref.WeakSet()  # open lock files of this process


def _close_in_child() -> None:
    """A forked worker would keep the lock of a process that was killed."""
    for file in list(_held):
        file.close()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_close_in_child)


class RunFolder:
    """The folder of one run, locked from `open` to `close`.

    Args:
        path: the folder; `open` makes it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: IO[bytes] | None = None
        self._is_new = False

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def open(self, *, resume: bool) -> dict[str, Any]:
        """Makes the folder where it is not there, and locks it.

        Args:
            resume: whether the folder of an earlier run is welcome.

        Returns:
            the description of that run; {} where there is none.

        Raises:
            FileExistsError: something is in the folder, and `resume` is false.
            BlockingIOError: another process has the lock.
            OSError: the folder cannot be made or read.
            ValueError: the folder is not of a run.
        """
        if not resume:
            self._check_empty()
        self._is_new = not self.path.is_dir()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(
                errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.path)
            ) from None
        self._take_lock(PATIENCE if resume else 0.0)
        try:
            if not resume:
                self._check_empty()  # nobody has begun one meanwhile
            return self._description()
        except BaseException:
            self.close()
            raise

    def _check_empty(self) -> None:
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.path))
        if self._names():
            what = "holds a run: --resume continues it" if self._is_run() else "is not empty"
            raise FileExistsError(f"{self.path} {what}; a new run needs an empty folder")

    def _names(self) -> set[str]:
        """Names of what is in the folder, but for the lock."""
        return set(os.listdir(self.path)) - {LOCK} if self.path.is_dir() else set()

    def _is_run(self) -> bool:
        return (self / DESCRIPTION).is_file()

    def _description(self) -> dict[str, Any]:
        if not self._is_run():
            if names := sorted(self._names()):
                raise ValueError(
                    f"{self.path} is not the folder of a run: it holds {names[0]}, but no "
                    f"{DESCRIPTION}"
                )
            return {}
        return read_description(self.path)

    def _take_lock(self, patience: float) -> None:
        end = time.monotonic() + patience
        while True:
            file = (self / LOCK).open("ab")
            _held.add(file)
            # Another process may have removed the file with a folder in which nothing was begun.
            if files.lock(file, wait=False) is not False and files.is_at(file, self / LOCK):
                break
            file.close()
            if time.monotonic() > end:
                raise BlockingIOError(
                    f"{self.path} is in use: another process trains in this folder"
                )
            time.sleep(0.1)
        self._lock = file

    def close(self) -> None:
        """Gives the lock back; a folder that was made in vain is removed."""
        if self._lock is None:
            return
        if self._is_new and not self._names():
            with contextlib.suppress(OSError):
                (self / LOCK).unlink()
                self.path.rmdir()
        files.unlock(self._lock)
        self._lock.close()
        self._lock = None

    def write_description(self, content: Mapping[str, Any]) -> None:
        """Writes run.json, whole or not at all."""
        text = json.dumps({"format": FORMAT, **content}, indent=2, ensure_ascii=False) + "\n"
        with files.replacing(self / DESCRIPTION) as file:
            file.write_text(text, encoding="utf-8")


def read_description(run: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a run's run.json.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no run.json that this version wrote.
    """
    path = Path(run) / DESCRIPTION
    with files.naming_file(path):
        content = json.loads(files.read_text(path))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"not of a run, or of another version: format {FORMAT} is read")
    return content


def load_run(
    run: str | os.PathLike[str], **options: Any
) -> tuple[EfficientNet, images.ImageClassification, tuple[str, ...]]:
    """The network of a run in eval mode, the preset of its images, and its class names.

    Args:
        run: the folder of a run that has ended, or a file of weights.
        options: as for `EfficientNet.from_checkpoint`.

    Raises:
        OSError, ValueError: there are no weights, or they cannot be read.
    """
    path = Path(run)
    if path.is_dir() and not (path / WEIGHTS).exists() and (path / DESCRIPTION).exists():
        raise ValueError(f"{path}: the run has not ended; --resume continues it")
    model = EfficientNet.from_checkpoint(path, **options).eval()
    return model, images.preset(model.variant), model.class_names
