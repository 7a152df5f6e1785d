"""The families of checkpoints, and what a family has beside the names of its parameters.

Sources: torchvision/models/efficientnet.py (0.28); timm/models/efficientnet.py (1.0);
https://github.com/lukemelas/EfficientNet-PyTorch (0.7.1); NVIDIA DeepLearningExamples,
PyTorch/Classification/ConvNets/image_classification/models/efficientnet.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType

INCEPTION_MEAN = INCEPTION_STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Family:
    """How a family's networks compute.

    Args:
        naming: how it names parameters, a key of `parameter_names.NAMINGS`.
        padding: of the convolutions that stride, "symmetric" or "same".
        bn_eps, bn_momentum: BatchNorm2d's constants; None means those of torchvision, which depend
            on the size.
        crop_border: pixels by which evaluation images are resized beyond the crop; None means
            torchvision's sizes.
    """

    naming: str
    padding: str = "symmetric"
    bn_eps: float | None = None
    bn_momentum: float | None = None
    crop_border: int | None = None


FAMILIES = MappingProxyType(
    {
        "torchvision": Family("torchvision"),
        "timm": Family("timm", "symmetric", 1e-5, 0.1),
        "timm_tf": Family("timm", "same", 1e-3, 0.1, 32),
        "lukemelas": Family("lukemelas", "same", 1e-3, 0.01, 32),
        "nvidia": Family("nvidia", "symmetric", 1e-3, 0.01, 32),
    }
)
# timm's and lukemelas's names of a network, which files and folders bear.
_NETWORK = re.compile(r"(?P<tf>tf_)?efficientnet(?:[_-](?:b\d|l2)(?!\d)|v2_[sml](?![a-z]))")
# Trained with AdvProp, or by timm's later recipes, on images normalised to [-1, 1].
_INCEPTION_NAME = re.compile(rf"^adv-efficientnet-b\d|{_NETWORK.pattern}[_.](?:ap(?![^-_.])|ra4_)")


def check_family(name: str, allowed: Iterable[str] = FAMILIES, argument: str = "family") -> None:
    """Raises ValueError for a name that is not among `allowed`."""
    if name not in allowed:
        raise ValueError(f"{argument} must be one of {', '.join(allowed)}, got {name!r}")


def timm_family(names: Iterable[str]) -> str | None:
    """ "timm_tf" or "timm" by the first of `names` that names an EfficientNet, else None.

    Both have the same parameter names; padding and eps differ.
    """
    for name in names:
        if match := _NETWORK.search(name):
            return "timm_tf" if match["tf"] else "timm"
    return None


def is_inception_normalised(names: Iterable[str]) -> bool:
    """Whether a file's name says that its images have mean and std 0.5 instead of ImageNet's."""
    return any(_INCEPTION_NAME.search(name) for name in names)
