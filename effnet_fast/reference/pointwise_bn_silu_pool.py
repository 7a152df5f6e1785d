"""1x1 convolution, batch normalisation, SiLU and the mean over H and W, in eager PyTorch.

Source: EfficientNet's last stage, Tan & Le (arXiv 1905.11946), table 1.
"""

from __future__ import annotations

from torch import Tensor

from effnet_fast.reference.activations import check_activation
from effnet_fast.reference.arguments import Layer
from effnet_fast.reference.pointwise_bn_act import check_arguments as check_pointwise
from effnet_fast.reference.pointwise_bn_act import pointwise_bn_act


def check_arguments(x: Tensor, layer: Layer, training: bool) -> None:
    """Raises as `pointwise_bn_silu_pool` says."""
    check_pointwise(x, layer, None, None, training)
    if 0 in x.shape[2:]:
        raise ValueError(f"x must have H and W of at least 1, got {list(x.shape)}")


def pointwise_bn_silu_pool(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """y = the mean over H and W of silu(bn(conv(x, weight))), or of another activation.

    Args:
        x: [N,Cin,H,W], any floating dtype and layout.
        weight: [Cout,Cin,1,1], cast to x's dtype.
        bn_weight, bn_bias: [Cout], or None for 1 and 0.
        running_mean, running_var: [Cout], updated in place when training; both may be None then.
        training: normalise by the batch's statistics instead of the running ones.
        momentum: share of the new statistics in the running ones.
        eps: added to the variance.
        activation: "silu", "identity", "relu", "relu6" or "hardswish".

    Returns:
        y [N,Cout] in x's dtype.

    Raises:
        TypeError: an argument that is not a floating-point tensor.
        ValueError: a wrong shape, no pixels, an unknown activation, running statistics missing
            outside training, or one value per channel in it.
    """
    layer = (weight, bn_weight, bn_bias, running_mean, running_var)
    check_activation("activation", activation)
    check_arguments(x, layer, training)
    y = pointwise_bn_act(
        x, *layer, activation=activation, training=training, momentum=momentum, eps=eps
    )
    return y.mean((2, 3))
