"""Dense convolution, BatchNorm and activation on the CPU's kernels: the stem."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effnet_fast.backends import native
from effnet_fast.ops import scratch
from effnet_fast.ops.registration import (
    BF16,
    Ints,
    address,
    addresses,
    empty_nhwc,
    isa_of,
    native_layer,
    nhwc,
)
from effnet_fast.ops.stem_conv_bn_silu import empty_conv, empty_eval, empty_sums, empty_weight_grad
from effnet_fast.reference.activations import kernel_activation
from effnet_fast.reference.arguments import Sides


def _shape(x: Tensor, weight: Tensor, z: Tensor, stride: Ints, padding: Sides) -> tuple[int, ...]:
    """The sizes of a call of a kernel."""
    return (*x.shape, *z.shape[1:], *weight.shape[2:], *stride, padding[0], padding[2])


def stem_conv_bn_silu_eval(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """The registered op."""
    *bn, stride, padding, eps, activation, backend = rest
    y = empty_eval(x, weight, *rest)
    if y.numel() == 0:
        return y
    weight, _kept, vectors = native_layer(weight, bn, x)
    native.load().stem_eval(
        isa_of(backend), _shape(x, weight, y, stride, padding), x.dtype is BF16,
        weight.dtype is BF16, x.data_ptr(), x.stride(), weight.data_ptr(), vectors, eps,
        y.data_ptr(), kernel_activation(activation), torch.get_num_threads(),
    )  # fmt: skip
    return y


def stem_conv(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The registered op."""
    *bn, stride, padding, eps, backend = rest
    z, norm = empty_conv(x, weight, *rest)
    if z.numel() == 0:
        return z, norm.zero_()
    weight, _kept, vectors = native_layer(weight, bn, x)
    native.load().stem_conv(
        isa_of(backend), _shape(x, weight, z, stride, padding), x.dtype is BF16,
        weight.dtype is BF16, x.data_ptr(), x.stride(), weight.data_ptr(), vectors, eps,
        z.data_ptr(), norm.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return z, norm


def norm_silu(z: Tensor, norm: Tensor, activation: str, backend: str) -> Tensor:
    """The registered op."""
    y = empty_nhwc(z, z.shape)
    if y.numel():
        z = nhwc(z)
        native.load().norm_silu(
            isa_of(backend), z.numel() // z.shape[1], z.shape[1], z.dtype is BF16, z.data_ptr(),
            norm.data_ptr(), y.data_ptr(), kernel_activation(activation), torch.get_num_threads(),
        )  # fmt: skip
    return y


def norm_silu_sums(
    grad_y: Tensor, z: Tensor, norm: Tensor, activation: str, backend: str
) -> Tensor:
    """The registered op."""
    sums = empty_sums(grad_y, z, norm, activation, backend)
    if z.numel() == 0:
        return sums.zero_()
    grad_y, z = nhwc(grad_y), nhwc(z)
    native.load().norm_silu_sums(
        isa_of(backend), z.numel() // z.shape[1], z.shape[1], z.dtype is BF16, grad_y.data_ptr(),
        z.data_ptr(), norm.data_ptr(), sums.data_ptr(), kernel_activation(activation),
        torch.get_num_threads(),
    )  # fmt: skip
    return sums


def norm_silu_backward(
    grad_y: Tensor, z: Tensor, norm: Tensor, sums: Tensor | None, activation: str, backend: str
) -> Tensor:
    """The registered op. Inside a `scratch.scope` the result lies in memory that blocks share."""
    dz = scratch.empty_nhwc("f", z, z.shape)
    if z.numel():
        grad_y, z = nhwc(grad_y), nhwc(z)
        native.load().norm_silu_backward(
            isa_of(backend), z.numel() // z.shape[1], z.shape[1], z.dtype is BF16,
            *addresses(grad_y, z, norm, sums, dz), kernel_activation(activation),
            torch.get_num_threads(),
        )  # fmt: skip
    return dz


def stem_weight_backward(grad_y: Tensor, z: Tensor, *rest: Any) -> Tensor:
    """The registered op."""
    norm, sums, x, weight, stride, padding, activation, backend = rest
    grad = empty_weight_grad(grad_y, z, *rest)
    if z.numel() == 0:
        return grad.zero_()
    grad_y, z = nhwc(grad_y), nhwc(z)
    native.load().stem_weight_backward(
        isa_of(backend), _shape(x, weight, z, stride, padding), x.dtype is BF16, grad_y.data_ptr(),
        z.data_ptr(), norm.data_ptr(), address(sums), x.data_ptr(), x.stride(), grad.data_ptr(),
        kernel_activation(activation), torch.get_num_threads(),
    )  # fmt: skip
    return grad
