"""Depthwise convolution, BatchNorm and activation on the CPU's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effnet_fast.backends import native
from effnet_fast.ops.dwconv_bn_silu import empty_eval, empty_grads, empty_statistics, pixel_strides
from effnet_fast.ops.registration import (
    BF16,
    empty_nhwc,
    isa_of,
    native_layer,
    native_vectors,
    native_weight,
    nhwc,
)
from effnet_fast.reference.activations import kernel_activation
from effnet_fast.reference.arguments import Sides


def filter_shape(x: Tensor, z: Tensor, weight: Tensor, stride: int, padding: Sides) -> Any:
    """The sizes of a call of a depthwise kernel, x [N,C,H,W] to z [N,C,Ho,Wo]."""
    return (*x.shape, *z.shape[2:], weight.shape[-1], stride, padding[0], padding[2])


def compute_eval(
    y: Tensor,
    pooled: Tensor,
    x: Tensor,
    weight: Tensor,
    bn: Sequence[Tensor | None],
    stride: int,
    padding: Sides,
    eps: float,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Writes y [N,C,Ho,Wo], NHWC without gaps, and its means pooled [N,C]; returns both.

    bn is weight, bias, mean, var.
    """
    if y.numel() == 0:
        return y, pooled.zero_()
    weight, _kept, vectors = native_layer(weight, bn, x)
    native.load().dwconv_eval(
        isa_of(backend), filter_shape(x, y, weight, stride, padding),
        x.dtype is BF16, weight.dtype is BF16,
        x.data_ptr(), pixel_strides(x), weight.data_ptr(), vectors, eps,
        y.data_ptr(), pooled.data_ptr(), kernel_activation(activation), torch.get_num_threads(),
    )  # fmt: skip
    return y, pooled


def dwconv_bn_silu_eval(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The registered op."""
    results = empty_eval(x, weight, *rest)
    return compute_eval(*results, x, weight, rest[:4], *rest[4:])


def dwconv_statistics(
    x: Tensor, weight: Tensor, stride: int, padding: Sides, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered op."""
    z, mean, var = empty_statistics(x, weight, stride, padding, backend)
    if z.numel() == 0:
        return z, mean.zero_(), var.zero_()
    weight = native_weight(weight, x)
    native.load().dwconv_train(
        isa_of(backend), filter_shape(x, z, weight, stride, padding),
        x.dtype is BF16, weight.dtype is BF16, x.data_ptr(), pixel_strides(x), weight.data_ptr(),
        z.data_ptr(), mean.data_ptr(), var.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return z, mean, var


def bn_silu(z: Tensor, *rest: Any) -> Tensor:
    """The registered op."""
    *bn, eps, activation, backend = rest
    y = empty_nhwc(z, z.shape)
    if y.numel() == 0:
        return y
    _kept, vectors = native_vectors(bn)
    z = nhwc(z)
    native.load().bn_act(
        isa_of(backend), z.numel() // z.shape[1], z.shape[1], z.dtype is BF16,
        z.data_ptr(), vectors, eps, 0, y.data_ptr(), kernel_activation(activation),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def dwconv_bn_silu_backward(
    grad_y: Tensor, x: Tensor, z: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered op."""
    *bn, stride, padding, eps, training, wanted, activation, backend = rest
    grads = empty_grads(grad_y, x, z, weight, *rest)
    if z.numel() == 0:
        return grads[0].zero_(), grads[1].zero_(), grads[2].zero_()
    grad_y, (weight, _kept, vectors) = nhwc(grad_y), native_layer(weight, bn, x)
    grad_x, grad_weight, sums = (
        grad.data_ptr() if want else 0 for grad, want in zip(grads, wanted, strict=True)
    )
    native.load().dwconv_backward(
        isa_of(backend), filter_shape(x, z, weight, stride, padding),
        x.dtype is BF16, weight.dtype is BF16, x.data_ptr(), pixel_strides(x), z.data_ptr(),
        grad_y.data_ptr(), weight.data_ptr(), vectors, eps, training, grad_x, grad_weight,
        sums, kernel_activation(activation), torch.get_num_threads(),
    )  # fmt: skip
    return grads
