"""Lists of images: folders, tables of paths and labels, shards, and datasets from Python."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from effnet_fast.pretrained.images import UnreadableImageError
from effnet_fast.training.decoding import Draw

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
NO_LABEL = -1


class Sample(NamedTuple):
    """One image of a list."""

    index: int  # in the list
    image: Tensor | None  # uint8 [3,R,R]; None where it cannot be read
    label: int  # -1 where the list has no labels
    reason: str | None  # why it cannot be read


class ImageList(Dataset[Sample]):
    """Paths of images, with their labels where they have some.

    A torch dataset, once it has a crop; `effnet_fast.training.loading` reads it quicker.

    Args:
        paths: of the images, in order; for shards, names "SHARD/KEY.jpg".
        labels: a class index per image, or None.
        classes: the classes' names, or None where nothing names them.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        if labels is not None and len(labels) != len(paths):
            raise ValueError(f"{len(paths)} paths, but {len(labels)} labels")
        self.paths = paths
        self.labels = labels
        self.classes = None if classes is None else tuple(classes)
        self.crop: Any = None
        self.draw = Draw()

    def __len__(self) -> int:
        return len(self.paths)

    def label(self, index: int) -> int:
        """The label of an image; -1 where the list has none."""
        return NO_LABEL if self.labels is None else int(self.labels[index])

    def source(self, index: int) -> Any:
        """What a worker needs to read an image: small, and picklable."""
        return self.paths[index]

    def with_crop(self, crop: Any, *, seed: int = 0, epoch: int = 0) -> ImageList:
        """The same list, whose items are read with a crop of `effnet_fast.training.decoding`."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, crop=crop, draw=Draw(seed, epoch))
        return other

    def __getitem__(self, index: int) -> Sample:
        if self.crop is None:
            raise TypeError("an ImageList has pixels after with_crop(crop) alone")
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a list of {len(self)} images")
        index %= len(self)
        draw = self.draw._replace(index=index)
        try:
            image = self.crop(self.source(index), draw, name=self.paths[index])
        except UnreadableImageError as error:
            return Sample(index, None, self.label(index), error.reason)
        return Sample(index, image, self.label(index), None)


def open_images(
    data: Any, *, split: str | None = None, classes: Sequence[str] | None = None
) -> ImageList:
    """Lists the images that `data` names, in an order that depends on the data alone.

    Args:
        data: a folder with a folder per class; a folder of images; a table `.csv` or `.parquet`
            with the columns path and label, paths relative to the table; a list `.txt` of a path
            per line; shards "x-{000..007}.tar", local or http; or a torch dataset.
        split: "train" takes DATA/train, "val" DATA/val or else DATA/test, where they exist.
        classes: names of the training set's classes, so that labels agree with its own.

    Raises:
        OSError: it cannot be opened.
        ValueError: no images, a class that `classes` lacks, a label out of range.
    """
    folder = Path(os.fspath(data))
    if split is not None:
        for name in {"train": ("train",), "val": ("val", "test")}[split]:
            if (folder / name).is_dir():
                folder = folder / name
                break
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        return ImageList(sorted(str(p) for p in folder.iterdir() if p.suffix.lower() in SUFFIXES))
    order = list(names if classes is None else classes)
    paths, labels = [], []
    for name in names:
        if name not in order:
            raise ValueError(f"{folder}: class {name!r} is not among the {len(order)} known ones")
        for path in sorted((folder / name).rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                paths.append(str(path))
                labels.append(order.index(name))
    return ImageList(paths, labels, order)
