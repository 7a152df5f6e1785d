"""The head: 1x1 convolution, BatchNorm, activation and the mean over each image's pixels.

Computes: y[n] = mean over pixels of act(bn(x weight^T)), in inference, act being SiLU or
          clamp(lo, hi); backward of the passes of training, by the products of
          pointwise_backward.py
Shapes:   x [N,Cin,H,W], weight [Cout,Cin,1,1], y [N,Cout]
Dtypes:   x/y fp32|fp16|bf16, weight x's or fp32, vectors any; accumulation fp32, fp32 products
          IEEE unless torch.backends.cuda.matmul allows tf32
Layout:   channels_last without gaps: x is a matrix [N*H*W, Cin]
Tiling:   a program owns BM rows, which may cross images, and BN output channels, and loops over BK
          input channels; it stores one sum per image that its rows touch, folded in order
Bytes:    x once, weight once per row tile (from L2), N * Cout sums; the map of N*H*W * Cout values
          that would be written and read again never exists
FLOPs:    2 * N*H*W * Cin * Cout
Source:   Tan & Le (arXiv 1905.11946), table 1
Truth:    effnet_fast/reference/pointwise_bn_silu_pool.py
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .bn_act import image_of
from .elementwise import activated, load_affine
from .folds import fold_segments, segments_of
from .launching import (
    activation_constants,
    dense,
    dot_precision,
    empty_fp32,
    launch,
    nhwc,
    units,
)
from .pointwise_backward import launch_pointwise_bwd_data, launch_pointwise_bwd_weight


@triton.jit(do_not_specialize=["eps", "rows", "pixels", "segments", "in_units", "out_units"])
def pointwise_pool_fwd_kernel(
    x, weight, bn_weight, bn_bias, mean, var, eps, partial, lo, hi,
    rows, pixels, segments, in_units, out_units,
    VEC: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial [tiles,segments,1,Cout]: sums of act(u) over a tile's rows of each image."""
    in_channels, channels = in_units * VEC, out_units * VEC
    tiles = tl.cdiv(channels, BN)
    tile = tl.program_id(0) // tiles
    first = tile.to(tl.int64) * BM
    row = tl.arange(0, BM)
    row_inside = row < rows - first
    c = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    c_inside = c < channels
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, in_channels, BK):
        k = k0 + tl.arange(0, BK)
        k_inside = k < in_channels
        a = tl.load(
            x + first * in_channels + row[:, None] * in_channels + k[None, :],
            mask=row_inside[:, None] & k_inside[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            weight + c[None, :] * in_channels + k[:, None],
            mask=k_inside[:, None] & c_inside[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(a, b.to(x.dtype.element_ty), acc, input_precision=PRECISION)
    centre, scale, shift = load_affine(bn_weight, bn_bias, mean, var, eps, c, c_inside)
    value = activated((acc - centre[None, :]) * scale[None, :] + shift[None, :], lo, hi, ACT)
    last = tl.minimum(rows - 1, first + BM - 1)
    image = image_of(first, row, pixels) - first // pixels
    out = partial + tile.to(tl.int64) * segments * channels + c
    for segment in range((last // pixels - first // pixels + 1).to(tl.int32)):
        own = row_inside & (image == segment)
        total = tl.sum(tl.where(own[:, None], value, 0.0), 0)
        tl.store(out + segment * channels, total, mask=c_inside)


def pointwise_bn_silu_pool_eval(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    backend: str,
) -> Tensor:
    """The op of this name."""
    x = nhwc(x)
    n, in_channels, h, w = x.shape
    channels, rows, pixels = weight.shape[0], n * h * w, h * w
    if rows == 0:
        return x.new_zeros(n, channels)
    config = tuning.config("pointwise_pool_fwd", x, m=rows, n=channels, k=in_channels)
    tiles, segments = triton.cdiv(rows, config["BM"]), segments_of(pixels, config["BM"])
    partial = empty_fp32(x, tiles, segments, 1, channels)
    vec, in_units, out_units = units(in_channels, channels)
    act, bounds = activation_constants(activation)
    launch(
        pointwise_pool_fwd_kernel, (tiles * triton.cdiv(channels, config["BN"]),), x.device,
        (x, weight.contiguous(), *map(dense, (bn_weight, bn_bias, mean, var)), eps, partial,
         *bounds, rows, pixels, segments, in_units, out_units),
        config, VEC=vec, ACT=act, PRECISION=dot_precision(x.dtype),
    )  # fmt: skip
    sums = fold_segments(partial, n, pixels, config["BM"])
    return sums[0].div_(pixels).to(x.dtype)


def pointwise_bn_silu_pool_backward(
    q: Tensor,
    z: Tensor,
    norm: Tensor,
    sums: Tensor | None,
    x: Tensor,
    weight: Tensor,
    wanted: Sequence[bool],
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The op of this name."""
    grad_x, grad_weight = x.new_empty(0), empty_fp32(x, 0)
    if wanted[0]:
        grad_x, _ = launch_pointwise_bwd_data(None, z, norm, sums, weight, activation, q=q)
    if wanted[1]:
        grad_weight = launch_pointwise_bwd_weight(None, z, norm, sums, x, activation, q=q)
        grad_weight = grad_weight.view(weight.shape)
    return grad_x, grad_weight
