"""Images in folders: a folder per class, or all that lie in one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
NAMED = 5  # names that an error or a warning lists
SPLITS = {"train": ("train",), "val": ("val", "test")}  # the names of their folders


def is_image(path: str) -> bool:
    """Whether a file's name is that of an image; hidden files are none."""
    name = os.path.basename(path)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def walk(folder: str | os.PathLike[str]) -> Iterator[str]:
    """The images in a folder and in those below it, sorted by their names.

    Links to folders are followed.

    Raises:
        OSError: a folder cannot be read.
        ValueError: a link leads back to a folder that it lies in.
    """
    yield from _walk(os.fspath(folder), ())


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise ValueError(f"{folder}: a symbolic link that leads back to a folder above it")
    with os.scandir(folder) as found:
        entries = sorted((entry for entry in found), key=lambda entry: entry.name)
    for entry in entries:
        if _is_folder(entry):
            yield from _walk(entry.path, (*above, identity))
        elif is_image(entry.path):
            yield entry.path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith("."):
        return False
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself
        raise ValueError(f"{entry.path}: {error.strerror}") from error


def class_names(folder: str | os.PathLike[str]) -> list[str]:
    """The folders in a folder, sorted; hidden ones are left out."""
    with os.scandir(folder) as found:
        return sorted(entry.name for entry in found if _is_folder(entry))


def labelled(
    folder: str | os.PathLike[str], names: Sequence[str], classes: Sequence[str]
) -> tuple[list[str], list[int]]:
    """Paths and labels of a folder with a folder per class.

    Args:
        folder: holds the folders `names`.
        names: of the folders.
        classes: every class in the order of its label.

    Raises:
        ValueError: a folder that is none of the classes; a link that leads back.
    """
    unknown = [name for name in names if name not in classes]
    if unknown:
        hint = ""
        if set(unknown) & {name for split in SPLITS.values() for name in split}:
            hint = "; the folder seems to hold splits: name one of them"
        raise ValueError(
            f"{os.fspath(folder)}: {listed(unknown)} not among the {len(classes)} classes of the "
            f"training set ({listed(classes)}){hint}"
        )
    paths: list[str] = []
    labels: list[int] = []
    empty = []
    number = {name: label for label, name in enumerate(classes)}
    for name in names:
        found = list(walk(os.path.join(folder, name)))
        if not found:
            empty.append(name)
        paths += found
        labels += [number[name]] * len(found)
    if empty:
        warnings.warn(f"{os.fspath(folder)}: no images in class {listed(empty)}", stacklevel=2)
    with os.scandir(folder) as entries:
        loose = sum(entry.is_file() and is_image(entry.path) for entry in entries)
    if loose:
        warnings.warn(
            f"{os.fspath(folder)}: {loose} images lie beside the classes' folders and are left out",
            stacklevel=2,
        )
    return paths, labels


def listed(names: Sequence[str]) -> str:
    """A few names for a message, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:NAMED])
    return shown + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def splits(data: str | os.PathLike[str]) -> tuple[str, ...]:
    """Which of "train" and "val" a folder holds; none where it is a set of images itself."""
    found = []
    for split in SPLITS:
        try:
            part(data, split)
        except FileNotFoundError:
            continue
        found.append(split)
    return tuple(found)


def part(data: str | os.PathLike[str], split: str) -> Path:
    """The folder or table of a split in a folder: train/, or train.csv, train.parquet, train.txt.

    Raises:
        FileNotFoundError: the folder holds none; the message says what was looked for.
        ValueError: another split than "train" and "val".
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    for name in SPLITS[split]:
        for suffix in ("", ".csv", ".parquet", ".txt"):
            path = Path(data) / f"{name}{suffix}"
            if path.is_dir() if suffix == "" else path.is_file():
                return path
    wanted = " or ".join(f"{name}/" for name in SPLITS[split])
    raise FileNotFoundError(f"{os.fspath(data)} has no {wanted} and no table of that name")
