"""The families of checkpoints, and what a family has beside the names of its parameters.

Sources: torchvision/models/efficientnet.py (0.28); timm/models/efficientnet.py (1.0);
https://github.com/lukemelas/EfficientNet-PyTorch (0.7.1); NVIDIA DeepLearningExamples,
PyTorch/Classification/ConvNets/image_classification/models/efficientnet.py;
https://pypi.org/project/efficientnet-lite-pytorch (0.1.0), whose names are lukemelas's;
monai/networks/nets/efficientnet.py (1.6); transformers/models/efficientnet (5.24).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import MappingProxyType

INCEPTION_MEAN = INCEPTION_STD = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Family:
    """How a family's networks compute.

    Args:
        naming: how it names parameters, a key of `namings.NAMINGS`.
        padding: of the convolutions that stride, "symmetric" or "same".
        bn_eps, bn_momentum: BatchNorm2d's constants; None means those of torchvision, which depend
            on the size.
        crop_border: pixels by which evaluation images are resized beyond the crop; None means
            torchvision's sizes.
        mean, std: of images over [0, 1]; None means the size's own.
        fixed: whether padding is that of images of the size's resolution, whatever the images.
        expand_bn_momentum: of the expansions' BatchNorms, where it is not bn_momentum.
        lite: how its networks without squeeze-and-excitation compute, where it is otherwise.
    """

    naming: str
    padding: str = "symmetric"
    bn_eps: float | None = None
    bn_momentum: float | None = None
    crop_border: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    lite: Family | None = None
    fixed: bool = False
    expand_bn_momentum: float | None = None

    def of_blocks(self, squeeze: bool) -> Family:
        """The row of its networks with squeeze-and-excitation, or of those without."""
        return self if squeeze or self.lite is None else self.lite


_TIMM = Family("timm", "symmetric", 1e-5, 0.1)
_TIMM_TF = Family("timm", "same", 1e-3, 0.1, 32)
FAMILIES = MappingProxyType(
    {
        # torchvision has no Lite: under its names they are this package's.
        "torchvision": Family("torchvision", lite=Family("torchvision", "same", 1e-3, 0.01)),
        "timm": replace(_TIMM, lite=replace(_TIMM, mean=IMAGENET_MEAN, std=IMAGENET_STD)),
        "timm_tf": replace(
            _TIMM_TF, lite=replace(_TIMM_TF, mean=INCEPTION_MEAN, std=INCEPTION_STD)
        ),
        "lukemelas": Family("lukemelas", "same", 1e-3, 0.01, 32),
        # The encoders "efficientnet-b0" and so on of segmentation_models_pytorch.
        "smp": Family("lukemelas", "same", 1e-3, 0.01, 32, fixed=True),
        "monai": Family("monai", "same", 1e-3, 0.01, 32, fixed=True),
        "nvidia": Family("nvidia", "symmetric", 1e-3, 0.01, 32),
        # keras.applications, and the package efficientnet, which pads each image by its own size.
        "keras": Family("keras", "same", 1e-3, 0.01, 0, fixed=True),
        "efficientnet": Family("keras", "same", 1e-3, 0.01, 32),
        # Its configuration's momentum, .99, is PyTorch's; it does not reach the expansions.
        "transformers": Family(
            "transformers", "same", 1e-3, 0.99, 0, fixed=True, expand_bn_momentum=0.1
        ),
    }
)
# timm's and lukemelas's names of a network, which files and folders bear.
_NETWORK = re.compile(r"(?P<tf>tf_)?efficientnet(?:[_-](?:b\d|l2|lite\d)(?!\d)|v2_[sml](?![a-z]))")
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
