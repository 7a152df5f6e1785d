"""From an image file to the tensor that a network is evaluated on.

The transform is the evaluation preset of torchvision's IMAGENET1K_V1 weights on a PIL image:
resize the shorter side, crop the centre, scale to [0, 1], normalise by ImageNet's mean and std.
Source: torchvision/transforms/_presets.py, ImageClassification.
"""

from __future__ import annotations

import os
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from effnet_fast.models.variants import Variant

FORMATS = ("JPEG", "PNG", "WEBP")
MEAN = (0.485, 0.456, 0.406)  # ImageNet's channel means over [0, 1], red green blue
STD = (0.229, 0.224, 0.225)
RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
WIDE_MODES = ("I", "I;16", "I;16B", "I;16L")  # 16-bit grey, which Pillow would clip at 255


def load(path: str | os.PathLike[str]) -> Image.Image:
    """Reads a JPEG, PNG or WebP file whole, upright (EXIF orientation applied) and in RGB.

    Transparency is dropped; of an animation the first frame is taken.

    Raises:
        OSError: the file cannot be opened (absent, a folder, no permission).
        ValueError: it is of another format, truncated, corrupt, or has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb). The message names the path.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{os.fspath(path)}: refused as a decompression bomb: {error}") from error
    except UnidentifiedImageError as error:
        allowed = ", ".join(FORMATS)
        raise ValueError(f"{os.fspath(path)}: not an image of type {allowed}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{os.fspath(path)}: truncated or corrupt image: {error}") from error


def preprocess(image: Image.Image, variant: Variant) -> Tensor:
    """Prepares an image for evaluation as `variant` prescribes (resize, crop, interpolation).

    Args:
        image: any PIL image; it is converted to RGB.
        variant: a row of `effnet_fast.models.variants.VARIANTS`.

    Returns:
        float32 tensor [1, 3, crop, crop], channels_last.

    Raises:
        ValueError: the image is so narrow that resizing its shorter side would need more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    image = _resize_shorter_side(_to_rgb(image), variant.resize, variant.interpolation)
    pixels = np.array(_crop_center(image, variant.crop))  # [H, W, 3] uint8
    x = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
    x = x.to(torch.float32) / 255
    mean = torch.tensor(MEAN).view(3, 1, 1)
    std = torch.tensor(STD).view(3, 1, 1)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in WIDE_MODES:
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _resize_shorter_side(image: Image.Image, side: int, interpolation: str) -> Image.Image:
    width, height = image.size
    shorter, longer = min(width, height), max(width, height)
    if shorter == side:
        return image
    target = int(side * longer / shorter)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and side * target > limit:
        raise ValueError(
            f"image of {width}x{height} pixels is too narrow: resized to a shorter side of {side} "
            f"it would have {side * target} pixels, more than {limit}"
        )
    size = (side, target) if width <= height else (target, side)
    return image.resize(size, RESAMPLING[interpolation])


def _crop_center(image: Image.Image, side: int) -> Image.Image:
    width, height = image.size
    left = round((width - side) / 2.0)
    top = round((height - side) / 2.0)
    return image.crop((left, top, left + side, top + side))
