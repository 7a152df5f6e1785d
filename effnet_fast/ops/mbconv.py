"""A whole MBConv for inference as one op.

expand -> depthwise (which also pools) -> excite -> project, with the expanded tensors in memory
that the blocks of a network share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import scratch
from .dwconv_bn_silu import compute_eval as compute_depthwise
from .dwconv_bn_silu import output_shape
from .pointwise_bn_act import compute as compute_pointwise
from .registration import empty_nhwc, register
from .squeeze_excite import excite_op


def _eval_cpu(
    x: Tensor,
    expand: Any,
    depthwise: Any,
    squeeze: Any,
    project: Any,
    stride: int,
    padding: tuple[int, int, int, int],
    eps: list[float],
    residual: bool,
    backend: str,
) -> Tensor:
    y = _eval_fake(x, expand, depthwise, squeeze, project, stride, padding)
    h = x
    if expand:
        shape = (x.shape[0], expand[0].shape[0], *x.shape[2:])
        h = scratch.empty_nhwc("expanded", x, shape)
        weight, *bn = expand
        compute_pointwise(h, x, weight, bn, None, None, True, eps[0], backend)
    weight, *bn = depthwise
    shape = output_shape(h, weight.shape[-1], stride, padding)
    filtered = scratch.empty_nhwc("filtered", x, shape)
    pooled = x.new_empty(shape[:2], dtype=torch.float32)
    compute_depthwise(filtered, pooled, h, weight, bn, stride, padding, eps[1], backend)
    gate = excite_op(pooled, *squeeze, backend)[1]
    weight, *bn = project
    added = x if residual else None
    return compute_pointwise(y, filtered, weight, bn, gate, added, False, eps[2], backend)


def _eval_fake(
    x: Tensor,
    expand: Any,
    depthwise: Any,
    squeeze: Any,
    project: Any,
    stride: int,
    padding: tuple[int, int, int, int],
    *_: Any,
) -> Tensor:
    shape = output_shape(x, depthwise[0].shape[-1], stride, padding)
    return empty_nhwc(x, (shape[0], project[0].shape[0], *shape[2:]))


# Each layer is [weight, bn_weight, bn_bias, mean, var]; expand is empty where there is none.
eval_op = register(
    "mbconv_eval(Tensor x, Tensor?[] expand, Tensor?[] depthwise, Tensor?[] squeeze, "
    "Tensor?[] project, int stride, int[4] padding, float[] eps, bool residual, str backend)"
    " -> Tensor",
    _eval_cpu,
    _eval_fake,
)
