"""Arguments of forward have torchvision's names: callers may give them by name."""

from __future__ import annotations

import inspect

import pytest
import torch
import torchvision
from torch import nn

from effnet_fast.models import EfficientNet, EfficientNetFeatures
from effnet_fast.modules import layers
from effnet_fast.modules.same_padding import Conv2dSame
from effnet_fast.modules.stochastic_depth import StochasticDepth
from networks import MINI, random_images

STOCK = {
    EfficientNet: torchvision.models.EfficientNet,
    layers.MBConv: torchvision.models.efficientnet.MBConv,
    layers.Conv2dNormActivation: torchvision.ops.Conv2dNormActivation,
    layers.SqueezeExcitation: torchvision.ops.SqueezeExcitation,
    layers.Sequential: nn.Sequential,
    StochasticDepth: torchvision.ops.StochasticDepth,
    Conv2dSame: nn.Conv2d,
}


@pytest.mark.parametrize("kind", STOCK)
def test_names(kind: type) -> None:
    assert list(inspect.signature(kind.forward).parameters) == list(
        inspect.signature(STOCK[kind].forward).parameters
    )


def test_calls_by_name() -> None:
    model = EfficientNet(MINI)
    x = random_images(2, 32)
    with torch.no_grad():
        stem = model.features[0](input=x)
        model.features[1](input=stem)
        model.features[1][0].train()(input=stem)
        model.features[1][0].block[1](input=torch.randn(2, 8, 4, 4))
        model.features[:2](input=x)
        model(x=x)
        EfficientNetFeatures(MINI)(x=x)
    model.set_grad_checkpointing()
    model.features[1][0](input=stem.requires_grad_()).sum().backward()
    assert stem.grad is not None
