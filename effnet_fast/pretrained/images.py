"""From an image to the tensor that a network is evaluated on.

The preset is torchvision's: resize the shorter side, crop the centre, scale to [0, 1], normalise.
Source: torchvision/transforms/_presets.py, ImageClassification.
"""

from __future__ import annotations

import errno
import io
import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_fast import files

if TYPE_CHECKING:
    from PIL import Image

# Pillow is imported where it is used: presets of tensors do without, and importing it costs 20 ms.

FORMATS = ("JPEG", "PNG", "WEBP")
MEAN = (0.485, 0.456, 0.406)  # ImageNet's channel means over [0, 1], red green blue
STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("bilinear", "bicubic", "nearest-exact")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
ORIENTATION = 0x0112  # EXIF's tag
TURNED = (5, 6, 7, 8)  # its values that swap width and height
NOT_THE_IMAGE = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # a lack that every image would meet
WIDE_MODES = ("I", "I;16", "I;16B", "I;16L")  # 16-bit grey, which Pillow would clip at 255


class UnreadableImageError(ValueError):
    """An image that cannot be read: `path` names it, and `reason` says why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.reason)


def load(path: str | os.PathLike[str]) -> Image.Image:
    """Reads a JPEG, PNG or WebP file whole, upright (EXIF orientation applied) and in RGB.

    Transparency is dropped; of an animation the first frame is taken.

    Raises:
        OSError: the file cannot be opened (absent, a folder, no permission).
        UnreadableImageError: a ValueError; it is of another format, a pipe or a device, truncated,
            corrupt, or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb).
            The message names the path.
    """
    files.check_regular(path)
    return _decode(path, os.fspath(path), None)


def decode(
    source: str | os.PathLike[str] | bytes,
    *,
    least: int | None = None,
    shrink: Callable[[int, int], float] | None = None,
    name: str | None = None,
) -> Image.Image:
    """Decodes an image as `load` does, from a file or from its bytes.

    Args:
        source: the path of a JPEG, PNG or WebP file, or the content of one.
        least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as its shorter side
            keeps `least` pixels; this is quicker and changes pixels. None decodes the full size.
        shrink: instead of `least`, called with the upright image's width and height; it returns by
            which factor a JPEG may be decoded smaller at most.
        name: what errors call the image (default: the path, or "image").

    Returns:
        An RGB image, upright.

    Raises:
        UnreadableImageError: as `load`, and where the file cannot be opened.
    """
    if name is None:
        name = "image" if isinstance(source, bytes) else os.fspath(source)
    if least is not None:

        def shrink(width: int, height: int) -> float:
            return min(width, height) / least

    try:
        if not isinstance(source, bytes):
            files.check_regular(source)
        return _decode(source, name, shrink)
    except OSError as error:
        if error.errno in NOT_THE_IMAGE:
            raise
        raise UnreadableImageError(name, error.strerror or str(error)) from error
    except UnreadableImageError:
        raise
    except ValueError as error:  # a pipe or a device
        raise UnreadableImageError(name, str(error).removeprefix(f"{name}: ")) from error


def _decode(
    source: str | os.PathLike[str] | bytes,
    name: str,
    shrink: Callable[[int, int], float] | None,
) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=FORMATS) as image:
                factor = 1.0
                if shrink is not None:
                    turned = image.getexif().get(ORIENTATION, 1) in TURNED
                    factor = shrink(*(image.size[::-1] if turned else image.size))
                if factor >= 2:
                    # Pillow takes the largest of 1, 2, 4 and 8 that leaves this size.
                    width, height = image.size
                    image.draft(None, (int(width / factor), int(height / factor)))
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return _to_rgb(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableImageError(name, f"refused as a decompression bomb: {error}") from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError(name, f"not an image of type {', '.join(FORMATS)}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UnreadableImageError(name, f"truncated or corrupt image: {error}") from error


class ImageClassification(nn.Module):
    """Prepares images for evaluation, as torchvision's preset of the same name does.

    Called with a Pillow image of any mode, which is converted to RGB, or with a tensor
    [...,3,H,W] of integers (uint8: 0 to 255) or floating point (0 to 1), it returns float32
    [...,3,crop_size,crop_size], normalised. A tensor stays on its device.

    Args:
        crop_size: side of the centre crop, pixels; what the image lacks is filled with zeros.
        resize_size: length of the shorter side after resizing, pixels; or height and width, to
            which images of any shape are resized.
        mean, std: per channel, of values scaled to [0, 1].
        interpolation: "bilinear", "bicubic" or "nearest-exact", or torchvision's
            InterpolationMode of these.
        antialias: whether tensors are filtered when they shrink; Pillow images always are.

    Raises:
        ValueError: an argument outside what is allowed; a tensor of another shape; an image
            without pixels, or so narrow that resizing its shorter side would need more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels.
        TypeError: neither a Pillow image nor a tensor of integers or floating point.
    """

    def __init__(
        self,
        *,
        crop_size: int,
        resize_size: int | Sequence[int] = 256,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        interpolation: Any = "bilinear",
        antialias: bool | None = True,
    ) -> None:
        super().__init__()
        sides: list[Any] = [resize_size]
        if isinstance(resize_size, (list, tuple)):
            sides = [*resize_size]
        if len(sides) not in (1, 2):
            raise ValueError(f"resize_size must be one or two ints, got {resize_size!r}")
        for name, size in (("crop_size", crop_size), *(("resize_size", side) for side in sides)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {size!r}")
        interpolation = getattr(interpolation, "value", interpolation)
        if interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}"
            )
        if len(mean) != 3 or len(std) != 3 or not all(std):
            raise ValueError(
                f"mean and std must be three numbers, std without 0; got {mean!r} and {std!r}"
            )
        self.crop_size = [crop_size]
        self.resize_size = sides
        self.mean = list(mean)
        self.std = list(std)
        self.interpolation = interpolation
        self.antialias = antialias

    def forward(self, img: Image.Image | Tensor) -> Tensor:
        return self.normalise(self.crop(img))

    def crop(self, img: Image.Image | Tensor) -> Tensor:
        """Resizes and crops alone.

        Args:
            img: a Pillow image, or a tensor [...,3,H,W].

        Returns:
            [...,3,crop_size,crop_size]: uint8 of an image, a tensor's own dtype otherwise.
        """
        if isinstance(img, Tensor):
            return self._resize_and_crop_tensor(img)
        return self._resize_and_crop_image(img)

    def normalise(self, x: Tensor) -> Tensor:
        """Scales [...,3,H,W] of integers to [0, 1], subtracts the mean and divides by std.

        Returns:
            float32 of the same shape. `forward` is `normalise` of `crop`.
        """
        if not x.is_floating_point():
            x = x.to(torch.float32) / torch.iinfo(x.dtype).max
        x = x.to(torch.float32)
        mean = torch.tensor(self.mean, dtype=x.dtype, device=x.device).view(3, 1, 1)
        std = torch.tensor(self.std, dtype=x.dtype, device=x.device).view(3, 1, 1)
        return (x - mean) / std

    def extra_repr(self) -> str:
        return (
            f"crop_size={self.crop_size}, resize_size={self.resize_size}, mean={self.mean}, "
            f"std={self.std}, interpolation={self.interpolation}, antialias={self.antialias}"
        )

    def _resize_and_crop_image(self, image: Image.Image) -> Tensor:
        """A Pillow image to uint8 [3,crop,crop]."""
        from PIL import Image

        if not isinstance(image, Image.Image):
            raise TypeError(
                f"the image must be a Pillow image or a tensor, got {type(image).__name__}"
            )
        if self.antialias is False:
            warnings.warn(
                "antialias=False applies to tensors alone: Pillow always filters", stacklevel=5
            )
        image = _to_rgb(image)
        width, height = image.size
        new_height, new_width = self._resized(height, width)
        limit = Image.MAX_IMAGE_PIXELS
        grows = new_height * new_width > height * width
        if limit is not None and grows and new_height * new_width > limit:
            raise ValueError(
                f"image of {width}x{height} pixels is too narrow: resized to a shorter side of "
                f"{self.resize_size[0]} it would have {new_height * new_width} pixels, more than "
                f"{limit}"
            )
        way = self.interpolation.partition("-")[0]
        image = image.resize((new_width, new_height), Image.Resampling[way.upper()])
        side = self.crop_size[0]
        left, top = _crop_start(new_width, side), _crop_start(new_height, side)
        image = image.crop((left, top, left + side, top + side))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def _resize_and_crop_tensor(self, x: Tensor) -> Tensor:
        """[...,3,H,W] to [...,3,crop,crop] in the same dtype."""
        if not (x.is_floating_point() or x.dtype in INTEGERS):
            raise TypeError(f"a tensor image must be of integers or floating point, got {x.dtype}")
        if x.ndim < 3 or x.shape[-3] != 3:
            raise ValueError(f"a tensor image must be of shape [...,3,H,W], got {tuple(x.shape)}")
        height, width = x.shape[-2:]
        size = self._resized(height, width)
        if size != (height, width):
            x = self._resize_tensor(x, size)
        side = self.crop_size[0]
        top, left = _crop_start(size[0], side), _crop_start(size[1], side)
        return F.pad(x, (-left, left + side - size[1], -top, top + side - size[0]))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing."""
        if len(self.resize_size) == 1:
            return _resized(height, width, self.resize_size[0])
        _check_pixels(height, width)
        return self.resize_size[0], self.resize_size[1]

    def _way(self) -> dict[str, Any]:
        """How tensors are resized, for torch's interpolate."""
        if self.interpolation == "nearest-exact":
            return {"mode": self.interpolation}
        return {
            "mode": self.interpolation,
            "align_corners": False,
            "antialias": bool(self.antialias),
        }

    def _resize_tensor(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        leading, dtype = x.shape[:-3], x.dtype
        if x.numel() == 0:
            return x.new_empty(*leading, 3, *size)
        if dtype not in (torch.float32, torch.float64):
            x = x.to(torch.float32)
        x = F.interpolate(
            x.reshape(-1, *x.shape[-3:]),
            size,
            **self._way(),
        )
        if dtype == torch.uint8 and self.interpolation == "bicubic":
            x = x.clamp(0, 255)  # bicubic overshoots
        if dtype in INTEGERS:
            x = x.round()
        return x.to(dtype).reshape(*leading, 3, *size)


class Preprocessing(Protocol):
    """The columns of `effnet_fast.models.variants.VARIANTS` that evaluation images depend on."""

    @property
    def crop(self) -> int: ...
    @property
    def resize(self) -> int: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    @property
    def interpolation(self) -> str: ...
    @property
    def squash(self) -> bool: ...


def preset(variant: Preprocessing) -> ImageClassification:
    """The preset that `variant` prescribes (a row of `effnet_fast.models.variants.VARIANTS`)."""
    return ImageClassification(
        crop_size=variant.crop,
        resize_size=[variant.resize] * 2 if variant.squash else variant.resize,
        mean=variant.mean,
        std=variant.std,
        interpolation=variant.interpolation,
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in WIDE_MODES:
        from PIL import Image

        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _resized(height: int, width: int, shorter_side: int) -> tuple[int, int]:
    """Height and width when the shorter of them becomes `shorter_side`."""
    _check_pixels(height, width)
    longer_side = int(shorter_side * max(height, width) / min(height, width))
    return (longer_side, shorter_side) if width <= height else (shorter_side, longer_side)


def _check_pixels(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise ValueError(f"an image of {width}x{height} pixels has none to resize")


def _crop_start(length: int, side: int) -> int:
    """Where a centre crop begins; below 0 where zeros come first."""
    return -((side - length) // 2) if side > length else round((length - side) / 2.0)
