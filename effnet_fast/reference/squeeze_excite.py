"""Squeeze-and-excitation in eager PyTorch.

Source: Hu et al., "Squeeze-and-Excitation Networks" (arXiv 1709.01507), equations 2 to 4, with
SiLU in place of ReLU as in Tan & Le (arXiv 1905.11946); the hard-sigmoid as in Howard et al.
(arXiv 1905.02244).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_fast.reference.activations import activate, check_activation, check_gate, gate_of
from effnet_fast.reference.arguments import Layer, check_image, check_shape, check_tensor


def check_arguments(x: Tensor, layers: Layer) -> None:
    """Raises as `squeeze_excite` says of its four parameters."""
    reduce_weight, reduce_bias, expand_weight, expand_bias = layers
    check_image(x)
    channels = x.shape[1]
    if min(x.shape[2:]) < 1:
        raise ValueError(f"x must have H and W of at least 1, got {list(x.shape)}")
    check_tensor("reduce_weight", reduce_weight, x.device)
    if reduce_weight.dim() not in (2, 4) or reduce_weight.shape[0] < 1:
        raise ValueError(
            f"reduce_weight must be [R,C,1,1] or [R,C] with R >= 1, got {list(reduce_weight.shape)}"
        )
    reduced = reduce_weight.shape[0]
    check_tensor("expand_weight", expand_weight, x.device)
    check_shape("reduce_weight", reduce_weight, (reduced, channels, 1, 1), (reduced, channels))
    check_shape("expand_weight", expand_weight, (channels, reduced, 1, 1), (channels, reduced))
    for name, bias, size in (
        ("reduce_bias", reduce_bias, reduced),
        ("expand_bias", expand_bias, channels),
    ):
        if bias is not None:
            check_tensor(name, bias, x.device)
            check_shape(name, bias, (size,))


def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    *,
    activation: str = "silu",
    gate: str = "sigmoid",
) -> Tensor:
    """y = x * sigmoid(expand(silu(reduce(mean of x over H and W)))).

    Args:
        x: [N,C,H,W], any floating dtype and layout; H and W at least 1.
        reduce_weight: [R,C,1,1] or [R,C].
        reduce_bias: [R], or None for 0.
        expand_weight: [C,R,1,1] or [C,R].
        expand_bias: [C], or None for 0.
        activation: in the place of SiLU: "silu", "identity", "relu", "relu6" or "hardswish".
        gate: in the place of the sigmoid: "sigmoid" or "hardsigmoid".

    The two products run in the widest dtype among x and the parameters; the gate is cast back.

    Returns:
        y [N,C,H,W] in x's dtype.

    Raises:
        TypeError: an argument that is not a floating-point tensor.
        ValueError: a wrong shape, an empty image, an unknown activation or gate.
    """
    check_activation("activation", activation)
    check_gate("gate", gate)
    layers = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    check_arguments(x, layers)
    dtype = x.dtype
    for parameter in layers:
        if parameter is not None:
            dtype = torch.promote_types(dtype, parameter.dtype)
    pooled = F.adaptive_avg_pool2d(x, 1).to(dtype)
    hidden = activate(_conv1x1(pooled, reduce_weight, reduce_bias), activation)
    factors = gate_of(_conv1x1(hidden, expand_weight, expand_bias), gate)
    return x * factors.to(x.dtype)


def _conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight = weight.to(x.dtype).reshape(*weight.shape[:2], 1, 1)
    return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype))
