"""Small images and folders of them, for tests of reading."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth shapes of a drawn colour and phase, so that images differ and JPEG keeps them."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[0:height, 0:width]
    phase, gain = rng.uniform(0, 6, 3), rng.uniform(30, 110, 3)
    waves = [127 + gain[k] * np.sin(xx / 17 + phase[k]) * np.cos(yy / 23) for k in range(3)]
    return Image.fromarray(np.stack(waves, -1).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    """The content of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def class_folders(root: Path, counts: Mapping[str, int], size: tuple[int, int] = (40, 30)) -> Path:
    """A folder per class, with so many JPEG files; every file of the tree differs."""
    seed = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            photo(*size, seed=seed).save(root / name / f"{number:04d}.jpg")
            seed += 1
    return root


def shard(path: Path, samples: Sequence[Mapping[str, bytes]], first: int = 0) -> Path:
    """A tar file in WebDataset's format; a sample maps suffixes to contents."""
    with tarfile.open(path, "w") as archive:
        for number, sample in enumerate(samples):
            for suffix, content in sample.items():
                info = tarfile.TarInfo(f"{first + number:06d}{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path
