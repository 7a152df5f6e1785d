"""Small folders of images, and runs of training on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from networks import TINY

CLASSES = ("blue", "green", "red")
SIDE = 32  # pixels
# A run that takes a second: 18 images in 3 steps per epoch.
SMALL: dict[str, Any] = {
    "model": TINY,
    "resolution": SIDE,
    "batch": 6,
    "epochs": 2,
    "seed": 5,
    "workers": 0,
    "device": "cpu",
}


def make_images(folder: Path, per_class: int, seed: int = 0) -> None:
    """Writes a folder per class; noise whose strongest channel tells the class."""
    generator = np.random.default_rng(seed)
    for channel, name in enumerate(reversed(CLASSES)):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = generator.integers(0, 120, (SIDE + 8, SIDE, 3), dtype=np.uint8)
            pixels[:, :, channel] += 120
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def make_data(folder: Path, train: int = 6, val: int = 2) -> Path:
    """DATA with `train` and `val`, so many images per class."""
    make_images(folder / "train", train)
    make_images(folder / "val", val, seed=1)
    return folder
