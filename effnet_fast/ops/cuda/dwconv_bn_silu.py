"""Depthwise convolution, BatchNorm and activation on the CUDA kernels.

`forward` and `backward` are the passes as a fused MBConv uses them: x may be the raw output of the
convolution before, whose BatchNorm and activation are then applied as it is read. The registered
ops are special cases of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_fast.ops.cuda import statistics
from effnet_fast.ops.cuda.launching import DTYPES, Bn, launchers, queue, scratch
from effnet_fast.ops.cuda.tiles import Tile, filling, tile_for
from effnet_fast.ops.dwconv_bn_silu import empty_grads, output_shape, pixel_strides
from effnet_fast.ops.registration import address, empty_nhwc, native_weight, nhwc
from effnet_fast.reference.activations import kernel_activation
from effnet_fast.reference.arguments import Sides


class TilePlan(NamedTuple):
    """A launch's sizes: (n, c, h, w, oh, ow, k, stride, left, top), its tile, its partials."""

    shape: tuple[int, ...]
    tile: Tile
    chunks: int
    parts: int


@functools.lru_cache(maxsize=1024)
def _plan(
    backend: str, direction: str, shape: tuple[int, ...], dtype: torch.dtype, tile: Tile | None
) -> TilePlan:
    n, c, h, w, oh, ow, kernel, stride, left, top = shape
    backward = direction == "backward"
    if tile is None:
        tile = tile_for(direction, kernel, stride, dtype, c, w if backward else ow)
        sides = (h + top % stride, w + left % stride) if backward else (oh, ow)
        tile = filling(tile, n, c, *sides)
    return TilePlan(shape, tile, *launchers(backend).dwconv_parts(shape, tile, backward))


def plan(
    backend: str,
    direction: str,
    x: Tensor,
    kernel: int,
    stride: int,
    padding: Sides,
    tile: Tile | None = None,
) -> TilePlan:
    """How a "forward" or "backward" pass over x [N,C,H,W] is cut up; tile: None for the table's."""
    oh, ow = output_shape(x, kernel, stride, padding)[2:]
    shape = (*x.shape, oh, ow, kernel, stride, padding[0], padding[2])
    return _plan(backend, direction, shape, x.dtype, tile)


def forward(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: Sides,
    activation: str,
    backend: str,
    *,
    before: Bn | None = None,
    after: Bn | None = None,
    pools: bool = True,
    tile: Tile | None = None,
) -> tuple[Tensor, ...]:
    """Writes y [N,C,Ho,Wo], NHWC without gaps; returns its pooled mean, or its moments.

    Args:
        activation: that follows the BatchNorms.
        before: BatchNorm of x, followed by the activation; None to take x as it is.
        after: BatchNorm of the convolution's output, followed by the activation; None to write
            that output.
        pools: whether the mean of what follows `after` is wanted.
        tile: another tile than the table's.

    Returns:
        with `after` pooled [N,C], or nothing; else mean and biased variance [C]; all fp32.
    """
    n, c = x.shape[:2]
    cut = plan(backend, "forward", x, weight.shape[-1], stride, padding, tile)
    weight = native_weight(weight, x)
    rows = (n, cut.chunks, c) if after else (cut.parts, 4, c)
    partial = scratch(x, *rows) if pools or after is None else None
    before = before or Bn(None)
    pixels = y.shape[2] * y.shape[3]
    factor = 1.0 / pixels if cut.chunks == 1 else 1.0
    end = after or Bn(None)
    launchers(backend).dwconv_fwd(
        queue(x), cut.shape, DTYPES[x.dtype], DTYPES[weight.dtype], cut.tile,
        x.data_ptr(), pixel_strides(x), weight.data_ptr(), before.arguments,
        end.arguments, y.data_ptr(), address(partial), factor, kernel_activation(activation),
    )  # fmt: skip
    if partial is None:
        return ()
    if after is None:
        return statistics.moments(backend, partial)
    if cut.chunks == 1:
        return (partial.view(n, c),)
    pooled = scratch(x, n, c)
    sizes, strides = (n, cut.chunks, 1, c), (c, 0, 1)
    return (statistics.fold(backend, partial, sizes, pooled, strides, 1.0 / pixels),)


def backward(
    grad_y: Tensor,
    z: Tensor,
    x: Tensor,
    weight: Tensor,
    after: Bn,
    sums: Tensor | None,
    stride: int,
    padding: Sides,
    activation: str,
    backend: str,
    *,
    before: Bn | None = None,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    wanted: Sequence[bool] = (True, True),
    tile: Tile | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of y = act(after(conv(act(before(x)), weight))).

    Args:
        grad_y, z: [N,C,Ho,Wo], NHWC without gaps; z is the convolution's output.
        sums: [2,C], sum of du and of du * zh, du being the gradient of after's output; None where
            its statistics are constants.
        activation: act.
        before: BatchNorm of x, followed by act; None where x was taken as it is.
        gate, shift: [N,C] fp32, the gradient of y is grad_y * gate + shift; None for 1 and 0.
        wanted: whether grad_x, and whether grad_weight and grad_before are.
        tile: another tile than the table's.

    Returns:
        grad_x [N,C,H,W], less what before's statistics add to it; grad_weight [C,1,K,K] in fp32;
        grad_before [2,C], the gradients of before's bias and weight. None where not wanted,
        or where there is no before.
    """
    n, c = x.shape[:2]
    taps = weight.shape[-1] ** 2
    cut = plan(backend, "backward", x, weight.shape[-1], stride, padding, tile)
    weight, before = native_weight(weight, x), before or Bn(None)
    grad_x = empty_nhwc(x, x.shape) if wanted[0] else None
    partial = scratch(x, cut.parts, taps + 2, c) if wanted[1] else None
    count = float(n * z.shape[2] * z.shape[3])
    launchers(backend).dwconv_bwd(
        queue(x), cut.shape, DTYPES[x.dtype], DTYPES[weight.dtype], cut.tile,
        x.data_ptr(), pixel_strides(x), before.arguments,
        grad_y.data_ptr(), z.data_ptr(), address(gate), address(shift),
        after.arguments, address(sums), count, weight.data_ptr(),
        address(grad_x), address(partial), kernel_activation(activation),
    )  # fmt: skip
    if partial is None:
        return grad_x, None, None
    sizes, grad_weight = (1, cut.parts, taps + 2, c), scratch(x, *weight.shape)
    statistics.fold(backend, partial, sizes, grad_weight, (0, 1, taps), rows=(0, taps))
    if before.vectors is None:
        return grad_x, grad_weight, None
    grad_before = scratch(x, 2, c)
    statistics.fold(backend, partial, sizes, grad_before, (0, c, 1), rows=(taps, 2))
    return grad_x, grad_weight, grad_before


def dwconv_bn_silu_eval(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The registered op."""
    *bn, stride, padding, eps, activation, backend = rest
    y = empty_nhwc(x, output_shape(x, weight.shape[-1], stride, padding))
    if y.numel() == 0:
        return y, scratch(x, *x.shape[:2]).zero_()
    (pooled,) = forward(y, x, weight, stride, padding, activation, backend, after=Bn(bn, eps))
    return y, pooled


def dwconv_statistics(
    x: Tensor, weight: Tensor, stride: int, padding: Sides, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered op."""
    z = empty_nhwc(x, output_shape(x, weight.shape[-1], stride, padding))
    if z.numel() == 0:
        mean = scratch(x, x.shape[1]).zero_()
        return z, mean, mean.clone()
    mean, var = forward(z, x, weight, stride, padding, "identity", backend)
    return z, mean, var


def bn_act(
    z: Tensor,
    bn: Bn,
    activation: str,
    backend: str,
    *,
    keep: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(bn(z)) * keep[n] + residual for z [N,C,H,W], NHWC without gaps; keep [N] in fp32.

    With keep and residual it is an MBConv's finish: BatchNorm, drop-path, residual.
    """
    y = empty_nhwc(z, z.shape)
    n, c, h, w = z.shape
    if y.numel():
        launchers(backend).bn_act(
            queue(z), (n, c, h * w), DTYPES[z.dtype], z.data_ptr(), address(residual),
            bn.arguments, address(keep), y.data_ptr(), kernel_activation(activation),
        )  # fmt: skip
    return y


def bn_silu(z: Tensor, *rest: Any) -> Tensor:
    """The registered op."""
    *bn, eps, activation, backend = rest
    return bn_act(nhwc(z), Bn(bn, eps), activation, backend)


def dwconv_bn_silu_backward(
    grad_y: Tensor, x: Tensor, z: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered op."""
    *vectors, stride, padding, eps, training, wanted, activation, backend = rest
    if z.numel() == 0:
        grads = empty_grads(grad_y, x, z, weight, *rest)
        return grads[0].zero_(), grads[1].zero_(), grads[2].zero_()
    grad_y, z, bn = nhwc(grad_y), nhwc(z), Bn(vectors, eps)
    sums = None
    if training or wanted[2]:
        sums = statistics.channel_sums(
            backend, statistics.BN_ACT, z, grad_y, bn, activation=activation
        )
    grad_x = grad_weight = None
    if wanted[0] or wanted[1]:
        grad_x, grad_weight, _ = backward(
            grad_y, z, x, weight, bn, sums if training else None, stride, padding, activation,
            backend, wanted=wanted[:2],
        )  # fmt: skip
    return (
        x.new_empty(0) if grad_x is None else grad_x,
        x.new_empty(0) if grad_weight is None else grad_weight,
        sums if wanted[2] and sums is not None else x.new_empty(0),
    )
