"""The passes of an MBConv in training on the CPU's kernels.

Results that no pass but the next reads (e, f) lie in memory that the blocks of a network share,
inside a `scratch.scope`. `mbconv_training.Passes` describes the arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effnet_fast.backends import native
from effnet_fast.ops import buffers, scratch
from effnet_fast.ops.cpu.dwconv_bn_silu import filter_shape
from effnet_fast.ops.dwconv_bn_silu import output_shape
from effnet_fast.ops.mbconv_passes import empty_weight_grad
from effnet_fast.ops.norms import NORM_ROWS
from effnet_fast.ops.registration import (
    BF16,
    addresses,
    empty_nhwc,
    isa_of,
    native_layer,
    native_layers,
    native_weight,
    nhwc,
)
from effnet_fast.reference.activations import kernel_activation, kernel_gate


def _product_shape(x: Tensor, channels: int) -> tuple[int, int, int, int]:
    n, c, h, w = x.shape
    return n, h * w, c, channels


def _kept_normed(like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """As `registration.empty_normed`; z, which backward needs, in memory kept for the next step."""
    norm = like.new_empty((len(NORM_ROWS), shape[1]), dtype=torch.float32)
    return buffers.empty(like, shape), norm


def _pointwise(
    x: Tensor,
    x_norm: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    rest: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    *bn, eps, activation, backend = rest
    channels = weight.shape[0]
    z, norm = _kept_normed(x, (x.shape[0], channels, *x.shape[2:]))
    if z.numel() == 0:
        return z, norm.zero_()
    x, (weight, _kept, vectors) = nhwc(x), native_layer(weight, bn, x)
    native.load().mbconv_pointwise(
        isa_of(backend), _product_shape(x, channels), x.dtype is BF16, weight.dtype is BF16,
        *addresses(x, x_norm, gate, weight), vectors, eps, z.data_ptr(), norm.data_ptr(),
        kernel_activation(activation), torch.get_num_threads(),
    )  # fmt: skip
    return z, norm


def mbconv_expand(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *bn_and_eps, backend = rest
    return _pointwise(x, None, None, weight, (*bn_and_eps, "identity", backend))


def mbconv_project(
    z2: Tensor, norm2: Tensor, gate: Tensor | None, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return _pointwise(z2, norm2, gate, weight, rest)


def _none(like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return like.new_empty(0, dtype=dtype)


def _pointer(tensor: Tensor, wanted: bool) -> int:
    return tensor.data_ptr() if wanted else 0


def mbconv_project_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_y, row_scale, z3, norm3, sums3, weight, z2, norm2, gate, wanted, *last = args
    activation, backend = last
    e, sums = _none(z2, z2.dtype), _none(z2)
    if wanted[0]:
        e = scratch.empty_nhwc("e", z2, z2.shape)
        sums = z2.new_empty((3, *z2.shape[:2]), dtype=torch.float32)
    grad_weight = empty_weight_grad(z2, weight, wanted[1])
    if z2.numel() == 0:
        return e, sums.zero_(), grad_weight.zero_()
    grad_y, weight = nhwc(grad_y), native_weight(weight, z2)
    native.load().mbconv_project_backward(
        isa_of(backend), _product_shape(z2, weight.shape[0]), z2.dtype is BF16,
        weight.dtype is BF16,
        *addresses(grad_y, row_scale, z3, norm3, sums3, weight, z2, norm2, gate),
        _pointer(e, wanted[0]), sums.data_ptr(), _pointer(grad_weight, wanted[1]),
        kernel_activation(activation), torch.get_num_threads(),
    )  # fmt: skip
    return e, sums, grad_weight


def mbconv_expand_backward(*args: Any) -> tuple[Tensor, Tensor]:
    f, z1, norm1, sums1, x, weight, residual, wanted, backend = args
    grad_x = empty_nhwc(x, x.shape) if wanted[0] else _none(x, x.dtype)
    grad_weight = empty_weight_grad(x, weight, wanted[1])
    if x.numel() == 0:
        return grad_x, grad_weight.zero_()
    x, weight = nhwc(x), native_weight(weight, x)
    residual = None if residual is None else nhwc(residual)
    native.load().mbconv_expand_backward(
        isa_of(backend), _product_shape(x, weight.shape[0]), x.dtype is BF16, weight.dtype is BF16,
        *addresses(f, z1, norm1, sums1, weight, x, residual), _pointer(grad_x, wanted[0]),
        _pointer(grad_weight, wanted[1]), torch.get_num_threads(),
    )  # fmt: skip
    return grad_x, grad_weight


def mbconv_depthwise(
    x: Tensor, x_norm: Tensor | None, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    *bn, stride, padding, eps, activation, backend = rest
    z, norm = _kept_normed(x, output_shape(x, weight.shape[-1], stride, padding))
    if z.numel() == 0:
        return z, norm.zero_()
    x, (weight, _kept, vectors) = nhwc(x), native_layer(weight, bn, x)
    native.load().mbconv_depthwise(
        isa_of(backend), filter_shape(x, z, weight, stride, padding), x.dtype is BF16,
        weight.dtype is BF16, *addresses(x, x_norm, weight), vectors, eps, z.data_ptr(),
        norm.data_ptr(), kernel_activation(activation), torch.get_num_threads(),
    )  # fmt: skip
    return z, norm


def mbconv_depthwise_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    e, gate, q, z2, norm2, sums2, x, x_norm, weight, residual, *rest = args
    stride, padding, wanted, activation, backend = rest
    f, sums = _none(x, x.dtype), _none(x)
    summed = wanted[0] and x_norm is not None
    if wanted[0]:  # without x_norm it is the gradient of x, and stays
        f = scratch.empty_nhwc("f", x, x.shape) if summed else empty_nhwc(x, x.shape)
    if summed:
        sums = x.new_empty((2, x.shape[1]), dtype=torch.float32)
    grad_weight = empty_weight_grad(x, weight, wanted[1])
    if z2.numel() == 0:
        return f, grad_weight.zero_(), sums.zero_()
    x, weight = nhwc(x), native_weight(weight, x)
    residual = None if residual is None else nhwc(residual)
    native.load().mbconv_depthwise_backward(
        isa_of(backend), filter_shape(x, z2, weight, stride, padding), x.dtype is BF16,
        weight.dtype is BF16,
        *addresses(e, gate, q, z2, norm2, sums2, x, x_norm, residual, weight),
        _pointer(f, wanted[0]), _pointer(grad_weight, wanted[1]), _pointer(sums, summed),
        kernel_activation(activation), torch.get_num_threads(),
    )  # fmt: skip
    return f, grad_weight, sums


def _plane(x: Tensor) -> tuple[int, int, int]:
    n, c, h, w = x.shape
    return n, h * w, c


def mbconv_squeeze(z: Tensor, norm: Tensor, activation: str, backend: str) -> tuple[Tensor, Tensor]:
    pooled = z.new_empty(z.shape[:2], dtype=torch.float32)
    slopes = z.new_empty((2, *z.shape[:2]), dtype=torch.float32)
    if z.numel() == 0:
        return pooled.zero_(), slopes.zero_()
    native.load().mbconv_squeeze(
        isa_of(backend), _plane(z), z.dtype is BF16, z.data_ptr(), norm.data_ptr(),
        pooled.data_ptr(), slopes.data_ptr(), kernel_activation(activation),
        torch.get_num_threads(),
    )  # fmt: skip
    return pooled, slopes


def mbconv_finish(
    z: Tensor, norm: Tensor, row_scale: Tensor | None, residual: Tensor | None, backend: str
) -> Tensor:
    y = empty_nhwc(z, z.shape)
    residual = None if residual is None else nhwc(residual)
    if z.numel():
        native.load().mbconv_finish(
            isa_of(backend), _plane(z), z.dtype is BF16,
            *addresses(z, norm, row_scale, residual, y), torch.get_num_threads(),
        )  # fmt: skip
    return y


def mbconv_finish_backward(
    grad_y: Tensor, row_scale: Tensor | None, z: Tensor, norm: Tensor, backend: str
) -> Tensor:
    sums = z.new_empty((2, z.shape[1]), dtype=torch.float32)
    if z.numel() == 0:
        return sums.zero_()
    grad_y = nhwc(grad_y)
    native.load().mbconv_finish_backward(
        isa_of(backend), _plane(z), z.dtype is BF16, *addresses(grad_y, row_scale, z, norm, sums),
        torch.get_num_threads(),
    )  # fmt: skip
    return sums


def mbconv_excite_backward(*args: Any) -> tuple[Tensor, ...]:
    sums, slopes, pooled, hidden, gate, reduce_weight, expand_weight, pixels, *last = args
    activation, gate_kind, backend = last
    (n, c), r = pooled.shape, hidden.shape[1]
    q, sums2 = torch.empty_like(pooled), pooled.new_empty(2, c)
    shapes = ((r, c), (r,), (c, r), (c,))
    grads = tuple(pooled.new_empty(shape) for shape in shapes)
    if n * pixels == 0:
        return (q, sums2.zero_(), *(grad.zero_() for grad in grads))
    layers, at = native_layers((reduce_weight, expand_weight))
    extension = native.load()
    extension.excite_backward(
        isa_of(backend), n, c, r, layers[0].dtype is BF16,
        pooled.data_ptr(), hidden.data_ptr(), gate.data_ptr(), sums.data_ptr(), *at,
        *(grad.data_ptr() for grad in grads), q.data_ptr(), kernel_activation(activation),
        kernel_gate(gate_kind), torch.get_num_threads(),
    )  # fmt: skip
    extension.mbconv_excite_sums(
        n, c, pixels, q.data_ptr(), gate.data_ptr(), sums.data_ptr(), slopes.data_ptr(),
        sums2.data_ptr(),
    )  # fmt: skip
    return (q, sums2, *grads)
