"""The head for inference: 1x1 convolution, BatchNorm, SiLU, and the mean over H and W.

On a GPU the map between SiLU and mean never reaches memory; the CPU composes what it has.
"""

from __future__ import annotations

from torch import Tensor

from .pointwise_bn_act import compute
from .registration import empty_nhwc, register


def _eval_cpu(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    backend: str,
) -> Tensor:
    y = empty_nhwc(x, (x.shape[0], weight.shape[0], *x.shape[2:]))
    bn = (bn_weight, bn_bias, mean, var)
    if y.numel() == 0:
        return x.new_zeros(y.shape[:2])
    return compute(y, x, weight, bn, None, None, True, eps, backend).mean((2, 3))


def _eval_fake(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


eval_op = register(
    "pointwise_bn_silu_pool_eval(Tensor x, Tensor weight, Tensor? bn_weight, Tensor? bn_bias, "
    "Tensor mean, Tensor var, float eps, str backend) -> Tensor",
    _eval_cpu,
    _eval_fake,
)
