"""Networks of a stem and one block of any kind, for the engines of inference."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effnet_fast
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
from effnet_fast.modules.same_padding import Conv2dSame
from effnet_fast.modules.structure import Geometry
from networks import TINY
from tolerances import assert_no_worse_than, assert_same_places

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


class Inside(nn.Module):
    """A convolution whose taps beyond the image are left out, where PyTorch multiplies zeros.

    What PyTorch's own does depends on the kernel that it takes; 0 times infinity is NaN. Sums are
    in fp32 or float64, of bf16 operands under autocast.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.stride, self.groups = conv.weight, conv.stride[0], conv.groups
        self.same = isinstance(conv, Conv2dSame)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.weight.shape[-1], self.stride
        geometry = Geometry((kernel,) * 2, (stride,) * 2, None if self.same else (kernel // 2,) * 4)
        left, _, top, _ = geometry.sides(*x.shape[2:])
        narrow = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
        with torch.autocast("cpu", enabled=False):
            x, weight = (t.to(narrow).to(self.weight.dtype) for t in (x, self.weight))
            y = x.new_zeros(x.shape[0], weight.shape[0], *geometry.out_size(*x.shape[2:]))
            for i, j in itertools.product(range(kernel), repeat=2):
                rows = [r for r in range(y.shape[2]) if 0 <= r * stride - top + i < x.shape[2]]
                columns = [c for c in range(y.shape[3]) if 0 <= c * stride - left + j < x.shape[3]]
                if rows and columns:
                    met = x[..., rows[0] * stride - top + i :, columns[0] * stride - left + j :]
                    met = met[..., ::stride, ::stride][..., : len(rows), : len(columns)]
                    tap = weight[..., i : i + 1, j : j + 1]
                    y[..., rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] += F.conv2d(
                        met, tap, groups=self.groups
                    )
            return y.to(narrow)


def check_infinite(model: nn.Module, x: Tensor, dtype: torch.dtype, isa: str) -> None:
    """Infinite corners of two filters of the block meet nothing beyond the image."""
    ((layer, conv),) = (
        (layer, layer[0])
        for layer in model.get_submodule("features.1").modules()
        if isinstance(layer, Conv2dNormActivation) and layer[0].kernel_size != (1, 1)
    )
    first = -1 if isinstance(conv, Conv2dSame) else 0  # a row of taps that leaves the image
    with torch.no_grad():
        conv.weight[1, 0, first, first] = torch.inf
        conv.weight[2, 0, first, -1 - first] = -torch.inf
    (y,) = effnet_fast.deploy(model, dtype, backend=f"cpu:{isa}")(x)
    if conv.groups > 1:  # PyTorch's own leaves these out, too
        assert_same_places(y, expectations(model, x)[1][torch.float32])
    layer[0] = Inside(conv)
    exact, stock = expectations(model, x)
    assert exact.isfinite().any()
    assert not exact.isfinite().all()
    assert_same_places(y, exact)
    # PyTorch's products of bf16 on the tile unit may spread a NaN to the pixel before it.
    finite = exact.isfinite() & stock[dtype].isfinite()
    assert_no_worse_than(y[finite].to(dtype), stock[dtype][finite], exact[finite])
