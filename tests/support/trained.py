"""Trained weights of Lite, and photographs: packages of the test extra hold them.

Trained weights have what random ones lack: channels that are dead, statistics of BatchNorm that
span ten orders of magnitude, and clamps that are reached at both ends.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

import effnet_fast
from effnet_fast.pretrained import images
from effnet_fast.pretrained.tables import LITE_BORDER, LITE_MEAN, LITE_STD
from networks import Trio

# What a photograph shows: the package that ships it, its file, and the class that Lite0 names.
PHOTOGRAPHS = {
    "coffee": ("skimage", "data/coffee.png", "espresso"),
    "camera": ("skimage", "data/camera.png", "tripod"),
    "chelsea": ("skimage", "data/chelsea.png", "tiger cat"),
    "china": ("sklearn", "datasets/images/china.jpg", "palace"),
    "flower": ("sklearn", "datasets/images/flower.jpg", "daisy"),
}


def path_of(photograph: str) -> Path:
    """The file of one of PHOTOGRAPHS; its package is not imported."""
    package, file, _ = PHOTOGRAPHS[photograph]
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    assert folders, f"{package} is not installed"
    return Path(folders[0], file)


@functools.cache
def _photographs(side: int) -> Tensor:
    preset = images.ImageClassification(
        crop_size=side,
        resize_size=side + LITE_BORDER * side // 224,
        mean=LITE_MEAN,
        std=LITE_STD,
        interpolation="bicubic",
    )
    return torch.stack([preset(images.load(path_of(name))) for name in PHOTOGRAPHS])


def photographs(side: int = 224) -> Tensor:
    """All of PHOTOGRAPHS, prepared for Lite: [5,3,side,side]."""
    return _photographs(side).clone()


@functools.cache
def _network(size: str) -> nn.Module:
    return getattr(effnet_fast, f"efficientnet_{size}")(weights="DEFAULT").eval()


def network(size: str = "lite0") -> nn.Module:
    """Lite0, Lite1 or Lite2 with its trained weights, in eval mode."""
    return copy.deepcopy(_network(size))


def trio() -> Trio:
    """Lite0 with its trained weights: fused, stock, and stock in float64."""
    stock = network()
    stock.backend = "reference"
    return Trio(network(), stock, copy.deepcopy(stock).double())
