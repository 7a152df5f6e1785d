"""MBConv as one function of its parameters, in eager PyTorch, and the dataclasses that describe it.

Source: Tan & Le (arXiv 1905.11946), section 4; Sandler et al. (arXiv 1801.04381); squeeze-and-
excitation: Hu et al. (arXiv 1709.01507).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from effnet_fast.reference.activations import check_activation, check_gate
from effnet_fast.reference.arguments import Padding, check_image, check_shape, check_tensor
from effnet_fast.reference.dwconv_bn_silu import check_arguments as check_depthwise
from effnet_fast.reference.dwconv_bn_silu import dwconv_bn_silu
from effnet_fast.reference.pointwise_bn_act import check_arguments as check_pointwise
from effnet_fast.reference.pointwise_bn_act import pointwise_bn_act
from effnet_fast.reference.squeeze_excite import check_arguments as check_squeeze_excite
from effnet_fast.reference.squeeze_excite import squeeze_excite

MEMORY = ("fast", "lean")


class ConvParams(NamedTuple):
    """A convolution without bias, and the BatchNorm behind it.

    Args:
        weight: [Cout,Cin/groups,K,K].
        bn_weight, bn_bias: [Cout], or None for 1 and 0.
        running_mean, running_var: [Cout], updated in place in training; both may be None then.
    """

    weight: Tensor
    bn_weight: Tensor | None = None
    bn_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None


class SqueezeExciteParams(NamedTuple):
    """The two layers of squeeze-and-excitation.

    Args:
        reduce_weight: [R,C,1,1] or [R,C].
        reduce_bias: [R], or None for 0.
        expand_weight: [C,R,1,1] or [C,R].
        expand_bias: [C], or None for 0.
    """

    reduce_weight: Tensor
    reduce_bias: Tensor | None
    expand_weight: Tensor
    expand_bias: Tensor | None


@dataclass(frozen=True)
class MBConvParams:
    """The tensors of a block.

    Args:
        expand: weight [C,Cin,1,1]; None where the block does not expand (C = Cin).
        depthwise: weight [C,1,K,K].
        squeeze: see `SqueezeExciteParams`; None where the block has no squeeze-and-excitation.
        project: weight [Cout,C,1,1].
    """

    expand: ConvParams | None
    depthwise: ConvParams
    squeeze: SqueezeExciteParams | None
    project: ConvParams


@dataclass(frozen=True)
class MBConvConfig:
    """What a block does beside its tensors.

    Args:
        stride: of the depthwise convolution.
        padding: of the depthwise convolution: None for (K-1)//2, an int, or (left, right, top,
            bottom).
        residual: whether x is added to the output, which must have x's shape.
        eps: added to the variances of the expansion's, the depthwise and the projection's
            BatchNorm; a number stands for all three, here and below.
        momentum: share of the batch's statistics in the running ones.
        activation: of the expansion and of the depthwise convolution: "silu", "identity", "relu",
            "relu6" or "hardswish".
        se_activation: of squeeze-and-excitation's first layer, likewise.
        gate: of squeeze-and-excitation: "sigmoid" or "hardsigmoid".
    """

    stride: int = 1
    padding: Padding = None
    residual: bool = False
    eps: float | tuple[float, float, float] = 1e-5
    momentum: float | tuple[float, float, float] = 0.1
    activation: str = "silu"
    se_activation: str = "silu"
    gate: str = "sigmoid"


Training = bool | tuple[bool, bool, bool]


def three(value: float | tuple[float, float, float]) -> tuple[float, float, float]:
    """One value for each of the three BatchNorms."""
    return value if isinstance(value, tuple) else (value,) * 3


def three_modes(training: Training) -> tuple[bool, bool, bool]:
    """Whether each of the three BatchNorms normalises by the batch.

    Raises:
        TypeError: neither a bool nor three of them.
    """
    if isinstance(training, tuple) and len(training) == 3:
        return training
    if not isinstance(training, bool):
        raise TypeError(f"training must be a bool or three of them, got {training!r}")
    return (training,) * 3


def check_arguments(
    x: Tensor,
    params: MBConvParams,
    config: MBConvConfig,
    training: Training,
    row_scale: Tensor | None,
    memory: str,
) -> tuple[int, int, int, int]:
    """Raises as `mbconv` says; returns the padding as (left, right, top, bottom)."""
    if memory not in MEMORY:
        raise ValueError(f"memory must be one of {', '.join(MEMORY)}, got {memory!r}")
    modes = three_modes(training)
    check_activation("activation", config.activation)
    check_activation("se_activation", config.se_activation)
    check_gate("gate", config.gate)
    check_image(x)
    h = x
    if params.expand is not None:
        check_pointwise(x, params.expand, None, None, modes[0])
        h = x[:, :1].expand(-1, params.expand.weight.shape[0], -1, -1)
    sides = check_depthwise(h, params.depthwise, config.stride, config.padding, modes[1])
    channels, kernel = params.depthwise.weight.shape[0], params.depthwise.weight.shape[-1]
    left, right, top, bottom = sides
    rows = (x.shape[2] + top + bottom - kernel) // config.stride + 1
    columns = (x.shape[3] + left + right - kernel) // config.stride + 1
    image = x[:1, :1, :1, :1].expand(x.shape[0], channels, rows, columns)
    if params.squeeze is not None:
        check_squeeze_excite(image, params.squeeze)
    check_pointwise(image, params.project, None, None, modes[2])
    out = (x.shape[0], params.project.weight.shape[0], rows, columns)
    if config.residual and out != tuple(x.shape):
        raise ValueError(f"a residual needs an output like x, {list(x.shape)}, not {list(out)}")
    if row_scale is not None:
        check_tensor("row_scale", row_scale, x.device)
        check_shape("row_scale", row_scale, (x.shape[0],))
    return sides


def mbconv(
    x: Tensor,
    params: MBConvParams,
    config: MBConvConfig,
    *,
    training: Training,
    row_scale: Tensor | None = None,
    memory: str = "fast",
) -> Tensor:
    """y = x + row_scale * bn(project(squeeze_excite(silu(bn(depthwise(silu(bn(expand(x)))))))).

    A block may have no expansion and no squeeze-and-excitation, and another activation than SiLU.

    Args:
        x: [N,Cin,H,W], any floating dtype and layout.
        params: see `MBConvParams`.
        config: see `MBConvConfig`.
        training: whether the BatchNorms normalise by the batch; a bool for all, or one for each.
        row_scale: [N] or None for 1: the factor of each image's body under drop-path.
        memory: "fast" or "lean"; here both are the same.

    Returns:
        y [N,Cout,Ho,Wo] in x's dtype.

    Raises:
        TypeError: an argument that is not a floating-point tensor, or of another type than allowed.
        ValueError: a shape, stride, padding or mode out of range, an unknown activation or gate.
    """
    sides = check_arguments(x, params, config, training, row_scale, memory)
    modes, eps, momentum = three_modes(training), three(config.eps), three(config.momentum)
    h, activation = x, config.activation
    if params.expand is not None:
        h = pointwise_bn_act(
            h, *params.expand, activation=activation,
            training=modes[0], eps=eps[0], momentum=momentum[0],
        )  # fmt: skip
    h = dwconv_bn_silu(
        h, *params.depthwise, stride=config.stride, padding=sides, activation=activation,
        training=modes[1], eps=eps[1], momentum=momentum[1],
    )  # fmt: skip
    if params.squeeze is not None:
        h = squeeze_excite(h, *params.squeeze, activation=config.se_activation, gate=config.gate)
    y = pointwise_bn_act(
        h, *params.project, act=None, training=modes[2], eps=eps[2], momentum=momentum[2]
    )
    if row_scale is not None:
        y = y * row_scale.to(y.dtype).reshape(-1, 1, 1, 1)
    return y + x if config.residual else y
