"""Depthwise convolution, batch normalisation and SiLU, in eager PyTorch.

Source: MBConv's middle layer, Tan & Le (arXiv 1905.11946), section 4; BN: arXiv 1502.03167.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from effnet_fast.reference.activations import activate, check_activation
from effnet_fast.reference.arguments import (
    Layer,
    Padding,
    Sides,
    batch_norm,
    check_convolution,
    check_image,
    check_tensor,
)


def check_arguments(
    x: Tensor, layer: Layer, stride: int, padding: Padding, training: bool
) -> Sides:
    """Raises as `dwconv_bn_silu` says; returns the padding as (left, right, top, bottom)."""
    check_image(x)
    weight = layer[0]
    check_tensor("weight", weight, x.device)
    channels, kernel = x.shape[1], weight.shape[-1] if weight.dim() == 4 else 0
    if weight.shape != (channels, 1, kernel, kernel) or kernel < 1:
        raise ValueError(
            f"weight must be [C,1,K,K] with C = {channels} as in x, got {list(weight.shape)}"
        )
    return check_convolution(layer, x, stride, padding, training)


def dwconv_bn_silu(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    stride: int = 1,
    padding: Padding = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """y = silu(bn(conv_dw(x, weight))), or another activation in the place of SiLU.

    Args:
        x: [N,C,H,W], any floating dtype and layout.
        weight: [C,1,K,K], cast to x's dtype.
        bn_weight, bn_bias: [C], or None for 1 and 0.
        running_mean, running_var: [C], updated in place when training; both may be None then.
        stride: the same in both directions, at least 1.
        padding: None for (K-1)//2, an int, or (left, right, top, bottom).
        training: normalise by the batch's statistics instead of the running ones.
        momentum: share of the new statistics in the running ones.
        eps: added to the variance.
        activation: "silu", "identity", "relu", "relu6" or "hardswish".

    Returns:
        y [N,C,Ho,Wo] in x's dtype, Ho = (H + top + bottom - K) // stride + 1, Wo likewise.

    Raises:
        TypeError: an argument that is not a floating-point tensor, or a padding of another type.
        ValueError: a shape, stride or padding out of range, a kernel larger than the padded
            input, an unknown activation, running statistics missing outside training, or one value
            per channel in it.
    """
    layer = (weight, bn_weight, bn_bias, running_mean, running_var)
    check_activation("activation", activation)
    left, right, top, bottom = check_arguments(x, layer, stride, padding, training)
    if left == right and top == bottom:
        z = F.conv2d(x, weight.to(x.dtype), None, stride, (top, left), groups=x.shape[1])
    else:
        x = F.pad(x, (left, right, top, bottom))
        z = F.conv2d(x, weight.to(x.dtype), None, stride, 0, groups=x.shape[1])
    return activate(batch_norm(z, layer[1:], training, momentum, eps), activation)
