"""Networks of a stem and one block of any kind, for the engines of inference."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiers
from cases import MBConvCase
from effnet_fast import use_backend
from effnet_fast.backends import native
from effnet_fast.models import EfficientNetFeatures
from effnet_fast.modules.layers import (
    Conv2dNormActivation,
    MBConv,
    MBConvConfig,
    SqueezeExcitation,
)
from networks import TINY

Kind = type[nn.Module]
DTYPES = (torch.float32, torch.bfloat16)
# The instruction sets that this machine has; AMX is the engines' alone.
ISAS = [isa for isa in native.load().isas() if not native.load().isa_unavailable_reason(isa)]


def inference_runs(cases: Iterable[Any]) -> pytest.MarkDecorator:
    """Parameters `case`, `dtype` and `isa`: all that run here, each in its tier.

    Not bf16 on a set that does not multiply it: the network would be computed in fp32.
    """
    rows = [
        pytest.param(
            *(case, dtype, isa),
            id=f"{case.name}-{dtype}-{isa}",
            marks=tiers.marks(f"cpu:{isa}", dtype, case),
        )
        for case in cases
        for dtype in DTYPES
        for isa in ISAS
        if dtype is torch.float32 or native.load().network_has_bf16(isa)
    ]
    return pytest.mark.parametrize(("case", "dtype", "isa"), rows)


def expectations(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[torch.dtype, Tensor]]:
    """The last output of the network in float64, and stock's in each dtype, by autocast."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad(), use_backend("reference"):
        y = exact(x.double())[-1]
        stock = {torch.float32: model(x)[-1]}
        with torch.autocast("cpu", torch.bfloat16):
            stock[torch.bfloat16] = model(x)[-1]
    return y, stock


def network_of(
    case: MBConvCase, activation: Kind = nn.SiLU, gate: Kind | None = nn.Sigmoid
) -> EfficientNetFeatures:
    """A stem that keeps the size and this block, whose result is the only map.

    Args:
        case: the block's sizes.
        activation: the class of every activation.
        gate: that of the gate, None for no squeeze-and-excitation.
    """
    model = EfficientNetFeatures(TINY, out_indices=(0,))
    config = MBConvConfig(case.expanded / case.c, case.k, case.stride, case.c, case.out)
    block = MBConv(config, 0.0, nn.BatchNorm2d)
    layer = functools.partial(Conv2dNormActivation, activation_layer=activation)
    expand = [layer(case.c, case.expanded, 1)] if case.expanded != case.c else []
    depthwise = layer(case.expanded, case.expanded, case.k, case.stride, groups=case.expanded)
    squeeze = [] if gate is None else [SqueezeExcitation(case.expanded, case.r, activation, gate)]
    project = layer(case.expanded, case.out, 1, activation_layer=None)
    block.block = nn.Sequential(*expand, depthwise, *squeeze, project)
    block.use_res_connect = case.residual
    model.features = nn.Sequential(layer(3, case.c, 3), nn.Sequential(block))
    model._taken = [1]
    return model


def randomise(model: nn.Module) -> nn.Module:
    """Weights that keep the variance at about 1, and statistics of every size."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    tensor.normal_(std=0.3)
    return model.eval()
