"""Lists of images: folders, tables of paths and labels, shards, and datasets from Python."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from effnet_fast.training.data import folders, shards, tables
from effnet_fast.training.data.decoding import Draw, UnreadableImageError
from effnet_fast.training.data.folders import splits

__all__ = ["DatasetList", "ImageList", "Sample", "ShardList", "open_images", "splits"]

NO_LABEL = -1
TABLES = (".csv", ".parquet", ".txt")


class Sample(NamedTuple):
    """One image of a list."""

    index: int  # type: ignore[assignment]  # in the list; the name hides a method of tuple
    image: Tensor | None  # uint8 [3,R,R]; None where it cannot be read
    label: int  # -1 where the list has no labels
    reason: str | None  # why it cannot be read


class ImageList(Dataset[Sample]):
    """Paths of images, with their labels where they have some.

    A torch dataset, once it has a crop; `effnet_fast.training.data.loading` reads it quicker.

    Args:
        paths: of the images, in order; of an image in a shard, "SHARD/KEY.jpg".
        labels: a class index per image, or None.
        classes: the classes' names in the order of their indices, or None where nothing names them.

    Raises:
        ValueError: another number of labels than of paths, or a label that is no class.
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
        if labels is not None and self.classes is not None:
            for path, label in zip(paths, labels, strict=True):
                check_label(path, label, len(self.classes))
        self.crop: Any = None
        self.draw = Draw()

    def __len__(self) -> int:
        return len(self.paths)

    def label(self, index: int) -> int:
        """The label of an image; -1 where the list does not know it."""
        return NO_LABEL if self.labels is None else int(self.labels[index])

    def source(self, index: int) -> Any:
        """What `reader` needs to read an image: small, and picklable."""
        return self.paths[index]

    def reader(self) -> Callable[[Any, Draw], tuple[Any, int | None]]:
        """A picklable function, from a source and a draw to what a crop takes, and a label."""
        return read_path

    def with_crop(self, crop: Any, *, seed: int = 0, epoch: int = 0) -> ImageList:
        """The same list, whose items are read with a crop of `training.data.decoding`."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, crop=crop, draw=Draw(seed, epoch))
        return other

    def __getitem__(self, index: int) -> Sample:
        if self.crop is None:
            raise TypeError("an ImageList has pixels after with_crop(crop) alone")
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a list of {len(self)} images")
        index %= len(self)
        draw = self.draw._replace(image=index)
        label = self.label(index)
        try:
            source, own = self.reader()(self.source(index), draw)
            image = self.crop(source, draw, name=self.paths[index])
        except UnreadableImageError as error:
            return Sample(index, None, label, error.reason)
        return Sample(index, image, label if own is None else own, None)


def read_path(source: str, draw: Draw) -> tuple[str, None]:
    """The reader of files: a crop opens them itself."""
    return source, None


class ShardList(ImageList):
    """Images in shards.

    Args:
        entries: of `effnet_fast.training.data.shards`.
        sizes: images of each shard, in order: `EpochSampler(blocks=...)` takes them, so that every
            process reads shards of its own.
        labels, classes: as in `ImageList`.
    """

    def __init__(
        self,
        entries: Sequence[shards.Entry],
        sizes: Sequence[int],
        labels: Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__([entry.name for entry in entries], labels, classes)
        self.members = [entry.member for entry in entries]
        self.sizes = tuple(sizes)

    def source(self, index: int) -> shards.Member:
        """Where the image lies."""
        return self.members[index]

    def reader(self) -> Callable[[Any, Draw], tuple[Any, int | None]]:
        """Reads the image's bytes."""
        return shards.read_member


class DatasetList(ImageList):
    """A torch dataset of (image, label), or of images alone.

    Args:
        dataset: has a length, and items by index: a Pillow image or a tensor [3,H,W] (uint8, or
            floating point from 0 to 1), and a label. Its `classes` and `targets` are used where it
            has them, as torchvision's datasets do.
        classes: of the training set; the dataset's own names are looked up in it.
    """

    def __init__(self, dataset: Any, classes: Sequence[str] | None = None) -> None:
        own = getattr(dataset, "classes", None)
        own = None if own is None else [str(name) for name in own]
        self.dataset = dataset
        self.numbers: list[int] | None = None  # of the own classes among `classes`
        if classes is not None and own is not None and list(classes) != own:
            unknown = [name for name in own if name not in classes]
            if unknown:
                raise ValueError(
                    f"{type(dataset).__name__}: {folders.listed(unknown)} not among the "
                    f"{len(classes)} classes of the training set ({folders.listed(classes)})"
                )
            self.numbers = [list(classes).index(name) for name in own]
        labels = getattr(dataset, "targets", None)
        if labels is not None:
            labels = [self._number(f"item {i}", int(x)) for i, x in enumerate(labels)]
        names = [f"{type(dataset).__name__}[{i}]" for i in range(len(dataset))]
        super().__init__(names, labels, own if classes is None else classes)

    def _number(self, name: str, label: int) -> int:
        if self.numbers is None:
            return label
        check_label(name, label, len(self.numbers))
        return self.numbers[label]

    def source(self, index: int) -> int:
        """The index itself."""
        return index

    def reader(self) -> Callable[[Any, Draw], tuple[Any, int | None]]:
        """Asks the dataset."""
        count = None if self.classes is None else len(self.classes)
        return DatasetReader(self.dataset, self.numbers, count)


class DatasetReader:
    """Reads items of a dataset; their own random numbers depend on the draw alone."""

    def __init__(self, dataset: Any, numbers: Sequence[int] | None, classes: int | None) -> None:
        self.dataset, self.numbers, self.classes = dataset, numbers, classes

    def __call__(self, source: int, draw: Draw) -> tuple[Any, int | None]:
        states = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=()):
            seed = draw.number()
            torch.default_generator.manual_seed(seed)  # CUDA's generators stay as they are
            random.seed(seed)
            np.random.seed(seed % 2**32)
            try:
                item = self.dataset[source]
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])
        if not isinstance(item, (tuple, list)):
            return item, None
        image, label = item[0], int(item[1])
        if self.numbers is not None:
            check_label(f"item {source}", label, len(self.numbers))
            label = self.numbers[label]
        check_label(f"item {source}", label, self.classes)
        return image, label


def check_label(name: str, label: int, classes: int | None) -> None:
    """Refuses a label that is no class.

    Raises:
        ValueError: names the image, the label and what is allowed.
    """
    if label < 0 or (classes is not None and label >= classes):
        allowed = "0 or more" if classes is None else f"0 to {classes - 1}"
        raise ValueError(f"{name}: label {label} is out of range, allowed is {allowed}")


def open_images(
    data: Any,
    *,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    labelled: bool = True,
    cache: str | os.PathLike[str] | None = None,
) -> ImageList:
    """Lists the images that `data` names, in an order that depends on the data alone.

    Args:
        data: a folder with a folder per class; a folder of images; an image; a table `.csv` or
            `.parquet` with the columns path and label (and, where it has one, split), paths
            relative to the table; a list `.txt` of a path per line; shards "x-{000..007}.tar",
            local or http; a sequence of paths; a torch dataset; or an `ImageList`, as it is.
        split: "train" takes DATA/train, "val" DATA/val or else DATA/test: a folder, or a table of
            that name. A folder that holds neither is taken itself, if it is no split's sibling.
        classes: names of the training set's classes, so that labels agree with its own.
        labelled: False takes all images of a folder and of those below it, without labels.
        cache: where shards from a server are kept (default: torch.hub.get_dir()/shards).

    Raises:
        OSError: it cannot be opened.
        ValueError: no images; a class that `classes` lacks; a label out of range; a link that leads
            back to a folder above it.
        TypeError: a dataset without a length.
    """
    if isinstance(data, ImageList):
        return data
    if not isinstance(data, (str, os.PathLike)):
        return _open_python(data, classes)
    text = os.fspath(data)
    if shards.is_pattern(text):
        return _filled(_open_shards(text, classes if labelled else None, labelled, cache), text)
    path = Path(text)
    if split is not None and path.is_dir():
        path = _split(path, split)
    if path.is_dir():
        return _filled(_open_folder(path, classes, labelled), text)
    if path.suffix.lower() in TABLES:
        paths, labels, names = tables.read(path, split, classes)
        if classes is None and split != "val":
            _warn_of_empty(text, labels, names)
        return _filled(ImageList(paths, *((labels, names) if labelled else ())), text)
    if folders.is_image(text):
        os.stat(path)
        return ImageList([text])
    os.stat(path)
    raise ValueError(
        f"{text}: not among what holds images: a folder, {', '.join(TABLES)}, .tar, "
        f"{', '.join(folders.SUFFIXES)}"
    )


def _filled(images: ImageList, text: str) -> ImageList:
    if not len(images):
        raise ValueError(f"{text}: no images ({', '.join(folders.SUFFIXES)})")
    return images


def _split(path: Path, split: str) -> Path:
    try:
        return folders.part(path, split)
    except FileNotFoundError:
        if folders.splits(path):  # it has the other one
            raise
        return path


def _open_folder(path: Path, classes: Sequence[str] | None, labelled: bool) -> ImageList:
    names = folders.class_names(path) if labelled else []
    if not names:
        return ImageList(list(folders.walk(path)), None, classes if labelled else None)
    order = names if classes is None else list(classes)
    return ImageList(*folders.labelled(path, names, order), order)


def _open_python(data: Any, classes: Sequence[str] | None) -> ImageList:
    if isinstance(data, (list, tuple)) and all(isinstance(x, (str, os.PathLike)) for x in data):
        return _filled(ImageList([os.fspath(x) for x in data]), "the list of paths")
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise TypeError(
            f"images must be a path, a list of paths, or a dataset with __len__ and __getitem__; "
            f"got {type(data).__name__}"
        )
    return _filled(DatasetList(data, classes), type(data).__name__)


def _open_shards(
    pattern: str,
    classes: Sequence[str] | None,
    labelled: bool,
    cache: str | os.PathLike[str] | None,
) -> ImageList:
    entries, sizes, names = shards.open_shards(pattern, cache)
    without = [entry.name for entry in entries if entry.label is None]
    if not labelled or len(without) == len(entries):
        return ShardList(entries, sizes)
    if without:
        raise ValueError(
            f"{pattern}: {len(without)} images have no label: {folders.listed(without)}"
        )
    found = [entry.label for entry in entries]
    order = tables.make_classes(pattern, found) if names is None else names
    if classes is not None:
        order = list(classes)
    labels = tables.numbers(pattern, [(e.name, e.label) for e in entries], order)
    if classes is None:
        _warn_of_empty(pattern, labels, order)
    return ShardList(entries, sizes, labels, order)


def _warn_of_empty(where: str, labels: Sequence[int] | None, classes: Sequence[str] | None) -> None:
    """Warns of classes without images."""
    seen = set(labels or ())
    empty = [name for number, name in enumerate(classes or ()) if number not in seen]
    if labels is not None and empty:
        warnings.warn(f"{where}: no images in class {folders.listed(empty)}", stacklevel=3)
