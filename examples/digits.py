"""scikit-learn's handwritten digits as folders of PNG files: `python examples/digits.py FOLDER`.

1,797 images of 8x8 pixels in ten classes, from the UCI repository; every fourth goes to val/, the
others to train/. The images lie in scikit-learn's wheel: nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

BRIGHTEST = 16  # of scikit-learn's grey values
EVERY = 4  # image goes to val/


def write(folder: Path, limit: int | None = None) -> dict[str, int]:
    """Writes FOLDER/train/3/0014.png and so on.

    Args:
        folder: is made where there is none.
        limit: how many images are written, None for all.

    Returns:
        the numbers of images by "train" and "val".
    """
    digits = load_digits()
    counts = {"train": 0, "val": 0}
    pairs = zip(digits.images[:limit], digits.target[:limit], strict=True)
    for index, (values, label) in enumerate(pairs):
        split = "val" if index % EVERY == EVERY - 1 else "train"
        counts[split] += 1
        path = folder / split / str(label) / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = (values * (255 / BRIGHTEST)).round().astype(np.uint8)
        Image.fromarray(grey).save(path)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    counts = write(folder)
    print(f"{folder}: {counts['train']} images in train/, {counts['val']} in val/")
