"""1x1 convolution, batch normalisation, activation, gate and residual, in eager PyTorch.

Source: MBConv's expand and project layers, Tan & Le (arXiv 1905.11946), section 4.
"""

from __future__ import annotations

from types import EllipsisType

import torch.nn.functional as F
from torch import Tensor

from effnet_fast.reference.activations import activate, check_activation
from effnet_fast.reference.arguments import (
    Layer,
    batch_norm,
    check_batch_norm,
    check_image,
    check_shape,
    check_tensor,
)

Act = str | EllipsisType | None  # an ellipsis: not given


def check_arguments(
    x: Tensor,
    layer: Layer,
    gate: Tensor | None,
    residual: Tensor | None,
    training: bool,
) -> None:
    """Raises as `pointwise_bn_act` says of its tensors."""
    check_image(x)
    batch, in_channels, height, width = x.shape
    weight, *vectors = layer
    check_tensor("weight", weight, x.device)
    if weight.dim() != 4 or weight.shape[1:] != (in_channels, 1, 1):
        raise ValueError(
            f"weight must be [Cout,Cin,1,1] with Cin = {in_channels} as in x, "
            f"got {list(weight.shape)}"
        )
    channels = weight.shape[0]
    check_batch_norm(x.device, channels, vectors, training)
    if gate is not None:
        check_tensor("gate", gate, x.device)
        check_shape("gate", gate, (batch, in_channels, 1, 1))
    if residual is not None:
        check_tensor("residual", residual, x.device)
        check_shape("residual", residual, (batch, channels, height, width))


def activation_of(act: Act, activation: str | None) -> str:
    """The activation that the two arguments of `pointwise_bn_act` name.

    Raises:
        ValueError: an unknown name, or two that differ.
    """
    if activation is not None:
        check_activation("activation", activation)
    if isinstance(act, EllipsisType):
        return "silu" if activation is None else activation
    if act is not None:
        check_activation("act", act)
    named = "identity" if act is None else act
    if activation is not None and activation != named:
        raise ValueError(f"act is {act!r} and activation is {activation!r}: give one of the two")
    return named


def pointwise_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    act: Act = ...,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """y = act(bn(conv(x * gate, weight))) + residual.

    Args:
        x: [N,Cin,H,W], any floating dtype and layout.
        weight: [Cout,Cin,1,1], cast to x's dtype.
        bn_weight, bn_bias: [Cout], or None for 1 and 0.
        running_mean, running_var: [Cout], updated in place when training; both may be None then.
        act: "silu", "identity", "relu", "relu6", "hardswish", or None for "identity"; where it is
            not given, `activation`.
        activation: the name that the other ops have for `act`; None to take `act`. Where neither
            is given, "silu".
        gate: [N,Cin,1,1] or None, cast to x's dtype.
        residual: [N,Cout,H,W] or None, cast to x's dtype.
        training: normalise by the batch's statistics instead of the running ones.
        momentum: share of the new statistics in the running ones.
        eps: added to the variance.

    Returns:
        y [N,Cout,H,W] in x's dtype.

    Raises:
        TypeError: an argument that is not a floating-point tensor.
        ValueError: a wrong shape, an unknown activation, an `act` that is not `activation` where
            both are given, running statistics missing outside training, or one value per channel in
            it.
    """
    layer = (weight, bn_weight, bn_bias, running_mean, running_var)
    activation = activation_of(act, activation)
    check_arguments(x, layer, gate, residual, training)
    if gate is not None:
        x = x * gate.to(x.dtype)
    z = F.conv2d(x, weight.to(x.dtype))
    y = activate(batch_norm(z, layer[1:], training, momentum, eps), activation)
    return y if residual is None else y + residual.to(x.dtype)
