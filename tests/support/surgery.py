"""Replacements and changes of the kind that users make to a network's children."""

from __future__ import annotations

import types
import warnings

import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.nn import qat
from torch.nn.utils import fuse_conv_bn_eval, parametrize

from effnet_fast.modules.layers import MBConv, SqueezeExcitation


class DoubledConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class ShiftedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.25


class SteepSiLU(nn.SiLU):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(2 * x)


class Reversed(nn.Sequential):
    """A container whose forward is not that of Sequential."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(3))


class LowRankUpdate(nn.Module):
    """A convolution kept inside another module, as adapters do."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.extra = nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + 0.1 * self.extra(x)


class Damped(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.9


def like(conv: nn.Conv2d, kind: type[nn.Conv2d] = nn.Conv2d, **changes: object) -> nn.Conv2d:
    """A convolution with the geometry of `conv` but for the changes."""
    arguments = {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": conv.kernel_size,
        "stride": conv.stride,
        "padding": conv.padding,
        "groups": conv.groups,
        "bias": False,
    }
    return kind(**{**arguments, **changes})  # type: ignore[arg-type]


def norm_like(bn: nn.BatchNorm2d, kind: type[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    """A norm of another class carrying the state of `bn`."""
    copy = kind(bn.num_features, bn.eps, bn.momentum)
    copy.load_state_dict(bn.state_dict())
    return copy


def set_item(container: nn.Sequential, index: int, module: nn.Module) -> None:
    container[index] = module.train(container.training)


def patch_forward(module: nn.Module, factor: float) -> None:
    """Replaces forward on the instance."""
    original = module.forward
    module.forward = types.MethodType(lambda self, x: original(x) * factor, module)


def quantization_aware(layer: nn.Sequential) -> None:
    conv = layer[0]
    conv.qconfig = quantization.QConfig(
        activation=nn.Identity, weight=quantization.default_weight_fake_quant
    )
    layer[0] = qat.Conv2d.from_float(conv)


def fuse_in_eval(layer: nn.Sequential) -> None:
    training = layer.training
    layer.eval()
    layer[0], layer[1] = fuse_conv_bn_eval(layer[0], layer[1]), nn.Identity()
    layer.train(training)


def parametrize_all(layer: nn.Sequential) -> None:
    parametrize.register_parametrization(layer[0], "weight", Damped())
    parametrize.register_parametrization(layer[1], "bias", Damped())


def legacy_weight_norm(conv: nn.Conv2d) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(conv)


def set_activations(model: nn.Module, kind: type[nn.Module], squeeze: bool = True) -> None:
    """Replaces every SiLU, or every sigmoid where `kind` is a gate, in place.

    Args:
        kind: called with inplace=True.
        squeeze: whether blocks keep their squeeze-and-excite.
    """
    before: type[nn.Module] = nn.Sigmoid if kind is nn.Hardsigmoid else nn.SiLU
    for parent in list(model.modules()):
        if not squeeze and isinstance(parent, MBConv):
            kept = [m for m in parent.block if not isinstance(m, SqueezeExcitation)]
            parent.block = nn.Sequential(*kept)
        for name, child in list(parent.named_children()):
            if type(child) is before:
                setattr(parent, name, kind(inplace=True))


def relu6_up_to(bound: float) -> nn.ReLU6:
    """A ReLU6 whose upper bound was changed by hand."""
    module = nn.ReLU6()
    module.max_val = bound
    return module
