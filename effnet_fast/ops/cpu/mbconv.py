"""A whole MBConv in inference on the CPU's kernels.

The expanded tensors are in memory that the blocks of a network share, inside a `scratch.scope`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effnet_fast.ops import scratch
from effnet_fast.ops.cpu.dwconv_bn_silu import compute_eval as compute_depthwise
from effnet_fast.ops.cpu.pointwise_bn_act import compute as compute_pointwise
from effnet_fast.ops.cpu.squeeze_excite import excite
from effnet_fast.ops.dwconv_bn_silu import output_shape
from effnet_fast.ops.registration import empty_nhwc
from effnet_fast.reference.arguments import Layer


def mbconv_eval(
    x: Tensor, expand: Layer, depthwise: Layer, squeeze: Layer, project: Layer, *rest: Any
) -> Tensor:
    """The registered op; expand and squeeze are empty where the block has none."""
    stride, padding, eps, residual, activation, *excite_kinds, backend = rest
    h = x
    if expand:
        shape = (x.shape[0], expand[0].shape[0], *x.shape[2:])
        h = scratch.empty_nhwc("expanded", x, shape)
        weight, *bn = expand
        compute_pointwise(h, x, weight, bn, None, None, eps[0], activation, backend)
    weight, *bn = depthwise
    shape = output_shape(h, weight.shape[-1], stride, padding)
    filtered = scratch.empty_nhwc("filtered", x, shape)
    pooled = x.new_empty(shape[:2], dtype=torch.float32)
    compute_depthwise(filtered, pooled, h, weight, bn, stride, padding, eps[1], activation, backend)
    gate = excite(pooled, *squeeze, *excite_kinds, backend)[1] if squeeze else None
    weight, *bn = project
    y = empty_nhwc(x, (shape[0], weight.shape[0], *shape[2:]))
    added = x if residual else None
    return compute_pointwise(y, filtered, weight, bn, gate, added, eps[2], "identity", backend)
