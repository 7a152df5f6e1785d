"""torchvision's EfficientNet.

Source: torchvision/models/efficientnet.py of torchvision 0.28, https://github.com/pytorch/vision.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from effnet_fast.inference.parts import FeaturesParts, Head
from effnet_fast.models.features_plan import ForeignFeatures
from effnet_fast.models.foreign.network import enter
from effnet_fast.modules import stock

_MODELS = "torchvision.models.efficientnet"


def _run_head(model: Any, x: Tensor) -> Tensor:
    """The result of the last stage's map."""
    x = model.avgpool(model.features[-1](x))
    result: Tensor = model.classifier(torch.flatten(x, 1))
    return result


def _parts(model: Any, code: stock.Stock) -> FeaturesParts:
    classifier = model.classifier
    head = Head(model.avgpool, True, classifier, classifier, partial(_run_head, model))
    return FeaturesParts(model.features, head, (), code, code)


enter(
    f"{_MODELS}:EfficientNet",
    ("_forward_impl",),
    _parts,
    (f"{_MODELS}:MBConv", f"{_MODELS}:FusedMBConv", "torchvision.ops.misc:Conv2dNormActivation"),
    inner=(("features", ForeignFeatures),),
)
