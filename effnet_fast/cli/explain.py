"""`classify --explain`: Grad-CAM overlays, as files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effnet_fast import files
from effnet_fast.cli import common
from effnet_fast.models.efficientnet import EfficientNet
from effnet_fast.pretrained.images import ImageClassification

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # Pillow's names


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds --explain."""
    parser.add_argument(
        "--explain",
        type=Path,
        metavar="FOLDER|FILE",
        help="write what speaks for the likeliest class (Grad-CAM) over each image: PNG files in "
        "this folder, or this file for one image",
    )


class Overlays:
    """Where the overlay of each image goes.

    Args:
        target: a folder, made where there is none, or a file with one of SUFFIXES.
        paths: of the images; a file takes one.

    Raises:
        CommandError: a file for several images, what cannot be written, or where the images are.
    """

    def __init__(self, target: Path, paths: Sequence[str]) -> None:
        self.target = target
        self._taken: set[str] = set()
        self.is_file = target.suffix.lower() in SUFFIXES and not target.is_dir()
        if self.is_file:
            if len(paths) > 1:
                raise common.CommandError(
                    f"--explain {target}: one file for {len(paths)} images; give a folder"
                )
            common.check_writable("--explain", target)
        else:
            with common.bad_input(OSError):
                target.mkdir(parents=True, exist_ok=True)
        for path in paths:  # overlays replace files of their names
            if _is_same(target, path if self.is_file else os.path.dirname(path) or "."):
                raise common.CommandError(
                    f"--explain {target}: {'is' if self.is_file else 'holds'} the image {path}, "
                    "which an overlay could replace; give another place"
                )

    def write(
        self, model: EfficientNet, preset: ImageClassification, x: Tensor, path: str, index: int
    ) -> str:
        """Writes the overlay of one class over the image as the network sees it.

        Args:
            model: in eval mode.
            preset: that prepared the image.
            x: the image [1,3,H,W].
            path: the image's own.
            index: the class.

        Returns:
            the overlay's path.
        """
        from effnet_fast.diagnostics.grad_cam import grad_cam, overlay

        target = self.target if self.is_file else self.target / self._name(path)
        cam = grad_cam(model, x, [index])[0]
        with common.bad_input(OSError, ValueError), files.replacing(target) as temporary:
            image = overlay(_image_of(x[0], preset), cam)
            image.save(temporary, format=SUFFIXES[target.suffix.lower()])
        return str(target)

    def _name(self, path: str) -> str:
        """A name in the folder that no image before has."""
        stem = name = Path(path).stem
        number = 1
        while name in self._taken:
            number += 1
            name = f"{stem}-{number}"
        self._taken.add(name)
        return f"{name}.png"


def _is_same(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:  # one of them is not there
        return False


def _image_of(x: Tensor, preset: ImageClassification) -> Image.Image:
    """The Pillow image that the preset made x [3,H,W] of."""
    from PIL import Image

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preset.mean, preset.std))
    pixels = (x.float().cpu() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
