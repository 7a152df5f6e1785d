"""From an image file to the pixels that a network takes: decoded, resized and cropped as uint8.

This runs in worker processes, on one thread; normalising and augmenting run in batches later.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from effnet_fast.pretrained.images import ImageClassification, UnreadableImageError, decode

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Draw", "EvaluationCrop", "TrainingCrop", "UnreadableImageError", "decode"]

ATTEMPTS = 10  # to draw a box that fits, as torchvision's RandomResizedCrop
SCALE = (0.08, 1.0)  # of the image's area; torchvision's default and the Inception paper's
RATIO = (3 / 4, 4 / 3)  # width by height
DRAFT_GAP = 2  # a draft has twice the pixels of the result, as in Pillow's thumbnail()


class Draw(NamedTuple):
    """What the randomness of an image depends on, and nothing else."""

    seed: int = 0
    epoch: int = 0
    image: int = 0  # its index in its list

    def number(self) -> int:
        """64 bits that differ from those of any other draw."""
        packed = struct.pack("<QQQ", *(value & (2**64 - 1) for value in self))
        return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


class EvaluationCrop:
    """Resizes and crops as a preset does: normalising the result equals the preset's output.

    Args:
        preset: of `effnet_fast.pretrained.images`.
        draft: lets JPEG files be decoded at a smaller size, at least twice the resized image's.
            This is quicker and changes pixels, so that results differ a little from the preset's.
    """

    def __init__(self, preset: ImageClassification, *, draft: bool = False) -> None:
        self.preset = preset
        self.draft = draft

    @property
    def size(self) -> int:
        """Side of the result, pixels."""
        return self.preset.crop_size[0]

    def __call__(
        self,
        source: str | os.PathLike[str] | bytes | Image.Image | Tensor,
        draw: Draw | None = None,
        *,
        name: str | None = None,
    ) -> Tensor:
        """An image to uint8 [3,size,size].

        Args:
            source: a path, the bytes of a file, a Pillow image, or a tensor [3,H,W]: uint8, or
                floating point from 0 to 1.
            draw: not used.
            name: what errors call the image.

        Raises:
            UnreadableImageError: it cannot be decoded, or is too narrow to be resized.
        """
        if isinstance(source, (str, os.PathLike, bytes)):
            least = DRAFT_GAP * max(self.preset.resize_size) if self.draft else None
            source = decode(source, least=least, name=name)
        elif isinstance(source, Tensor):
            source = to_uint8(source, name)
        try:
            return self.preset.crop(source)
        except ValueError as error:
            raise UnreadableImageError(name or "image", str(error)) from error


class TrainingCrop:
    """A random part of the image, resized to a square: torchvision's RandomResizedCrop.

    The part depends on the draw (seed, epoch, image) alone. JPEG files are decoded at a smaller
    size where the part keeps at least `size` pixels on either side.

    Args:
        size: side of the result, pixels.
        scale: range of the part's share of the image's area.
        ratio: range of the part's width by its height.
        interpolation: "bilinear", "bicubic" or "nearest-exact".

    Source: torchvision.transforms.RandomResizedCrop; Szegedy et al., arXiv 1409.4842, section 6.
    """

    def __init__(
        self,
        size: int,
        *,
        scale: tuple[float, float] = SCALE,
        ratio: tuple[float, float] = RATIO,
        interpolation: str = "bilinear",
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size!r}")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be two numbers, 0 < low <= high <= 1; got {scale!r}")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be two numbers, 0 < low <= high; got {ratio!r}")
        self.size = size
        self.scale = (float(scale[0]), float(scale[1]))
        self.ratio = (float(ratio[0]), float(ratio[1]))
        self.interpolation = interpolation

    def __call__(
        self,
        source: str | os.PathLike[str] | bytes | Image.Image | Tensor,
        draw: Draw | None = None,
        *,
        name: str | None = None,
    ) -> Tensor:
        """An image to uint8 [3,size,size]; the arguments are `EvaluationCrop`'s.

        Args:
            draw: where the part's place comes from; None draws from Python's own generator.
        """
        from PIL import Image

        generator = random.Random(None if draw is None else draw.number())
        box, whole = (0, 0, 0, 0), (0, 0)

        def choose(width: int, height: int) -> float:
            nonlocal box, whole
            box, whole = self.box(width, height, generator), (width, height)
            return min(box[2] - box[0], box[3] - box[1]) / self.size

        if isinstance(source, Tensor):
            source = to_image(source, name)
        if isinstance(source, Image.Image):
            image = source.convert("RGB")
        else:
            image = decode(source, shrink=choose, name=name)
        if whole == (0, 0):
            choose(*image.size)
        return _part(image, whole, box, self.size, self.interpolation)

    def box(self, width: int, height: int, generator: random.Random) -> tuple[int, int, int, int]:
        """Draws a part of an image: left, top, right, bottom in pixels."""
        low, high = (math.log(r) for r in self.ratio)
        for _ in range(ATTEMPTS):
            area = width * height * generator.uniform(*self.scale)
            ratio = math.exp(generator.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left = generator.randint(0, width - w)
                top = generator.randint(0, height - h)
                return left, top, left + w, top + h
        # The centre, as large as the range of ratios allows.
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w = max(1, min(width, round(height * ratio)))
        h = max(1, min(height, round(width / ratio)))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


def _part(
    image: Image.Image,
    whole: tuple[int, int],
    box: tuple[int, int, int, int],
    size: int,
    interpolation: str,
) -> Tensor:
    """The box, in pixels of the whole image, of an image that may have been decoded smaller."""
    x, y = image.width / whole[0], image.height / whole[1]
    left, top, right, bottom = box[0] * x, box[1] * y, box[2] * x, box[3] * y
    # Cropped first: the filter would otherwise reach beyond the box.
    outer = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
    image = image.crop(outer)
    inner = (
        left - outer[0],
        top - outer[1],
        min(right - outer[0], image.width),
        min(bottom - outer[1], image.height),
    )
    from PIL import Image

    way = Image.Resampling[interpolation.partition("-")[0].upper()]
    return from_image(image.resize((size, size), way, box=inner))


def from_image(image: Image.Image) -> Tensor:
    """An RGB image to uint8 [3,H,W], a view of [H,W,3]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_uint8(x: Tensor, name: str | None = None) -> Tensor:
    """Pixels [3,H,W] as uint8.

    Args:
        x: uint8, or floating point from 0 to 1.

    Raises:
        ValueError: of another dtype, or beyond [0, 1], as normalised pixels are.
    """
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise ValueError(
            f"{name or 'image'}: a tensor image must be uint8 or floating point, got {x.dtype}"
        )
    if x.numel() and not (float(x.min()) >= -1e-3 and float(x.max()) <= 1 + 1e-3):
        raise ValueError(
            f"{name or 'image'}: a tensor image of floating point must lie in [0, 1], got "
            f"{float(x.min()):.4g} to {float(x.max()):.4g}; normalising is done later"
        )
    return (x.float() * 255).round().clamp(0, 255).to(torch.uint8)


def to_image(x: Tensor, name: str | None = None) -> Image.Image:
    """Pixels [3,H,W], uint8 or floating point from 0 to 1, as a Pillow image."""
    if x.ndim != 3 or x.shape[0] != 3:
        raise ValueError(
            f"{name or 'image'}: a tensor image must be of shape [3,H,W], got {tuple(x.shape)}"
        )
    from PIL import Image

    return Image.fromarray(to_uint8(x, name).permute(1, 2, 0).contiguous().numpy())
