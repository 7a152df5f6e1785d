"""Other packages' networks, fit for comparison as `networks` says."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import efficientnet_pytorch
import timm
import torch
import torchvision
from timm.layers import DropPath
from torch import nn
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig

import effnet_fast
from effnet_fast.modules import foreign
from networks import CALIBRATION_IMAGES, Trio, random_images

RESOLUTION = 64


def _timm(name: str) -> Callable[[], nn.Module]:
    return functools.partial(timm.create_model, name, num_classes=10, drop_path_rate=0.2)


def _torchvision(name: str) -> Callable[[], nn.Module]:
    return functools.partial(torchvision.models.get_model, name, num_classes=10)


def _lite() -> nn.Module:
    with warnings.catch_warnings():  # of invalid escapes in its sources
        warnings.simplefilter("ignore")
        import efficientnet_lite_pytorch
    kind = efficientnet_lite_pytorch.EfficientNet
    made: nn.Module = kind.from_name("efficientnet-lite0", num_classes=10)
    return made


def _lukemelas(**options: object) -> Callable[[], nn.Module]:
    return functools.partial(
        efficientnet_pytorch.EfficientNet.from_name, "efficientnet-b0", num_classes=10, **options
    )


# One of every kind of block, padding, activation and gate.
SMOOTH = {
    "torchvision b0": _torchvision("efficientnet_b0"),
    "torchvision v2_s": _torchvision("efficientnet_v2_s"),
    "efficientnet_b0": _timm("efficientnet_b0"),
    "tf_efficientnet_b0": _timm("tf_efficientnet_b0"),
    "tf_efficientnetv2_b0": _timm("tf_efficientnetv2_b0"),
    "efficientnet_pytorch": _lukemelas(),
    "efficientnet_pytorch, any size": _lukemelas(image_size=None),
}
# Their gradients jump where an activation bends.
BENT = {
    "tf_efficientnet_lite0": _timm("tf_efficientnet_lite0"),
    "efficientnet_es": _timm("efficientnet_es"),
    "mobilenetv3_large_100": _timm("mobilenetv3_large_100"),
    "mnasnet_100": _timm("mnasnet_100"),
    "efficientnet_lite_pytorch": _lite,
}
NETWORKS = SMOOTH | BENT


def _small_torchvision() -> nn.Module:
    settings = [
        FusedMBConvConfig(1, 3, 1, 16, 16, 1),
        FusedMBConvConfig(4, 3, 2, 16, 24, 1),
        MBConvConfig(1, 3, 1, 24, 24, 1),
        MBConvConfig(6, 5, 2, 24, 32, 2),
    ]
    return torchvision.models.EfficientNet(settings, 0.2, num_classes=10, last_channel=64)


# A few blocks of every kind, for what takes its time with each operator.
SMALL = {"torchvision small": _small_torchvision, "test_efficientnet": _timm("test_efficientnet")}


def calibrate(model: nn.Module, resolution: int = RESOLUTION) -> None:
    """Makes a network well-conditioned, in place; leaves it in eval mode."""
    momenta = {}
    for module in model.modules():
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        if foreign.is_known(type(module)) and not foreign.is_network(type(module)) and norms:
            norms[-1].weight.data.mul_(0.25)
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            momenta[module], module.momentum = module.momentum, 1.0
        elif isinstance(module, (nn.Dropout, DropPath, torchvision.ops.StochasticDepth)):
            module.eval()
    with torch.no_grad():
        model(random_images(CALIBRATION_IMAGES, resolution, seed=1))
    for module, momentum in momenta.items():
        module.momentum = momentum
        module.num_batches_tracked.zero_()
    model.eval()


@functools.lru_cache(maxsize=1)
def _made(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (NETWORKS | SMALL)[name]()
        calibrate(model)
    return model


def trio(name: str) -> Trio:
    """A network accelerated, as its package has it, and in float64; all in eval mode."""
    stock = copy.deepcopy(_made(name))
    actual = effnet_fast.accelerate(copy.deepcopy(stock))
    return Trio(actual, stock, copy.deepcopy(stock).double())
