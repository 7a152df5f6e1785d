"""Fashion-MNIST as folders of PNG files: `python examples/fashion_mnist.py SOURCE FOLDER`.

60,000 images of 28x28 pixels for training and 10,000 for testing (Xiao et al., arXiv 1708.07747).
SOURCE is the folder of the four .gz files, as Debian's package dataset-fashion-mnist installs it
in /usr/share/datasets/fashion-mnist; no rights are needed to unpack it elsewhere:

    apt-get download dataset-fashion-mnist
    dpkg-deb -x dataset-fashion-mnist_*.deb unpacked
    python examples/fashion_mnist.py unpacked/usr/share/datasets/fashion-mnist fashion
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

INSTALLED = Path("/usr/share/datasets/fashion-mnist")
SPLITS = {"train": "train", "val": "t10k"}  # names of the files
CLASSES = (
    *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def read_idx(path: Path) -> np.ndarray:
    """The bytes of an IDX file: a header of sizes, big-endian, then the values.

    Raises:
        ValueError: the file holds something other than bytes, or fewer than its header says.
    """
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3] if content[:3] == b"\0\0\x08" else 0
    if not dimensions:
        raise ValueError(f"{path}: no IDX file of bytes")
    shape = np.frombuffer(content, ">u4", dimensions, 4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if values.size != shape.prod(dtype=np.int64):
        raise ValueError(f"{path}: {values.size} values, and its header says {shape.tolist()}")
    return values.reshape(shape)


def write(source: Path, folder: Path, limit: int | None = None) -> dict[str, int]:
    """Writes FOLDER/train/Coat/00005.png and so on.

    Args:
        source: the folder of the .gz files.
        folder: is made where there is none.
        limit: how many images of each split are written, None for all.

    Returns:
        the numbers of images by "train" and "val".
    """
    counts = {}
    for split, name in SPLITS.items():
        images = read_idx(source / f"{name}-images-idx3-ubyte.gz")[:limit]
        labels = read_idx(source / f"{name}-labels-idx1-ubyte.gz")[:limit]
        for label in CLASSES:
            (folder / split / label).mkdir(parents=True, exist_ok=True)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(folder / split / CLASSES[label] / f"{index:05}.png")
        counts[split] = len(images)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, nargs="?", default=INSTALLED)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    counts = write(arguments.source, arguments.folder)
    print(f"{arguments.folder}: {counts['train']} images in train/, {counts['val']} in val/")
