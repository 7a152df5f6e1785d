"""The head on the CPU: in inference the kernels of `pointwise_bn_act`, then PyTorch's mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effnet_fast.backends import native
from effnet_fast.ops.cpu.pointwise_bn_act import compute
from effnet_fast.ops.pointwise_bn_silu_pool import empty_grads
from effnet_fast.ops.registration import BF16, address, empty_nhwc, isa_of, native_weight, nhwc
from effnet_fast.reference.activations import kernel_activation


def pointwise_bn_silu_pool_eval(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """The registered op."""
    *bn, eps, activation, backend = rest
    y = empty_nhwc(x, (x.shape[0], weight.shape[0], *x.shape[2:]))
    if y.numel() == 0:
        return x.new_zeros(y.shape[:2])
    return compute(y, x, weight, bn, None, None, eps, activation, backend).mean((2, 3))


def pointwise_bn_silu_pool_backward(*args: Any) -> tuple[Tensor, Tensor]:
    """The registered op."""
    q, z, norm, sums, x, weight, wanted, activation, backend = args
    grad_x, grad_weight = empty_grads(*args)
    if z.numel() == 0:
        return grad_x.zero_(), grad_weight.zero_()
    n, c, h, w = x.shape
    x, weight = nhwc(x), native_weight(weight, x)
    native.load().pointwise_bn_silu_pool_backward(
        isa_of(backend), (n, h * w, c, z.shape[1]), x.dtype is BF16, weight.dtype is BF16,
        q.data_ptr(), z.data_ptr(), norm.data_ptr(), address(sums),
        weight.data_ptr(), x.data_ptr(), grad_x.data_ptr() if wanted[0] else 0,
        grad_weight.data_ptr() if wanted[1] else 0, kernel_activation(activation),
        torch.get_num_threads(),
    )  # fmt: skip
    return grad_x, grad_weight
