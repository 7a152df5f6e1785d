"""1x1 convolution with BatchNorm, activation, gate, residual: a product with what surrounds it.

Computes: z = in(x) weight^T with in(x) = x, or act(bn(x)), times gate[n, k] where there is one;
          y = z and its (count, mean, M2) by tile, or y = act(bn(z)) + residual; act is
          SiLU or clamp(lo, hi)
Shapes:   x [N,Cin,H,W], weight [Cout,Cin], gate [N,Cin], y and residual [N,Cout,H,W]
Dtypes:   x/y fp32|fp16|bf16, weight x's or fp32, vectors any; accumulation fp32, fp32 products
          IEEE unless torch.backends.cuda.matmul allows tf32
Layout:   channels_last without gaps: x is a matrix [N*H*W, Cin]
Tiling:   a program owns BM rows and BN output channels and loops over BK input channels; programs
          of one row tile are neighbours, so that x comes from memory once and from L2 afterwards
Bytes:    x and y once, residual once, weight once per row tile (from L2)
FLOPs:    2 * N*H*W * Cin * Cout
Source:   Tan & Le (arXiv 1905.11946), section 4
Truth:    effnet_fast/reference/pointwise_bn_act.py
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .bn_act import image_of
from .elementwise import activated, load_affine, load_norm, store_statistics, tile_statistics
from .launching import (
    NO_BN,
    BatchNorm,
    activation_constants,
    dense,
    dot_precision,
    empty_fp32,
    empty_nhwc,
    launch,
    nhwc,
    units,
)


@triton.jit
def load_operand(
    x, gate, norm, lo, hi, at, k, image, inside, k_inside, channels, ACT: tl.constexpr
):
    """A tile [BM,BK] of in(x) in fp32 from x + at; 0 where it is not `inside`."""
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if norm is not None:
        scale, shift, _, _ = load_norm(norm, channels, k, k_inside)
        value = activated(value * scale[None, :] + shift[None, :], lo, hi, ACT)
    if gate is not None:
        factor_at = image[:, None] * channels + k[None, :]
        value *= tl.load(gate + factor_at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, value, 0.0)


@triton.jit(do_not_specialize=["eps", "rows", "pixels", "in_units", "out_units"])
def pointwise_fwd_kernel(
    x, weight, y, gate, residual, in_norm, bn_weight, bn_bias, mean, var, eps, partial,
    lo, hi, rows, pixels, in_units, out_units,
    VEC: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [rows,Cout], and where partial [tiles,4,Cout] is given the statistics of y's tiles."""
    in_channels, channels = in_units * VEC, out_units * VEC
    tiles = tl.cdiv(channels, BN)
    tile = tl.program_id(0) // tiles
    first = tile.to(tl.int64) * BM
    row = tl.arange(0, BM)
    row_inside = row < rows - first
    c = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    c_inside = c < channels
    image = image_of(first, row, pixels)
    x_tile = x + first * in_channels
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, in_channels, BK):
        k = k0 + tl.arange(0, BK)
        k_inside = k < in_channels
        at = row[:, None] * in_channels + k[None, :]
        inside = row_inside[:, None] & k_inside[None, :]
        if gate is None and in_norm is None:
            a = tl.load(x_tile + at, mask=inside, other=0.0)
        else:
            a = load_operand(
                x_tile, gate, in_norm, lo, hi, at, k, image, inside, k_inside, in_channels, ACT
            ).to(x.dtype.element_ty)  # fmt: skip
        b = tl.load(
            weight + c[None, :] * in_channels + k[:, None],
            mask=k_inside[:, None] & c_inside[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(a, b.to(x.dtype.element_ty), acc, input_precision=PRECISION)
    y_inside = row_inside[:, None] & c_inside[None, :]
    if mean is not None:
        centre, scale, shift = load_affine(bn_weight, bn_bias, mean, var, eps, c, c_inside)
        acc = activated((acc - centre[None, :]) * scale[None, :] + shift[None, :], lo, hi, ACT)
    at = row[:, None] * channels + c[None, :]
    if residual is not None:
        acc += tl.load(residual + first * channels + at, mask=y_inside, other=0.0).to(tl.float32)
    stored = acc.to(y.dtype.element_ty)
    tl.store(y + first * channels + at, stored, mask=y_inside)
    if partial is not None:
        count = tl.minimum(rows - first, BM).to(tl.float32)
        tile_mean, squares, rest = tile_statistics(stored.to(tl.float32), y_inside, count)
        store_statistics(partial, tile, count, tile_mean, squares, rest, channels, c, c_inside)


def launch_pointwise_fwd(
    x: Tensor,
    weight: Tensor,
    *,
    gate: Tensor | None = None,
    in_norm: Tensor | None = None,
    bn: BatchNorm = NO_BN,
    eps: float = 0.0,
    activation: str = "identity",
    residual: Tensor | None = None,
    statistics: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y [N,Cout,H,W] as the file's head says, and partial statistics [tiles,4,Cout] if asked for.

    Args:
        in_norm: of the BN, with the activation, applied to x as it is loaded, or None.
        bn, eps: BN applied to the product, where the mean is given.
        activation: after `in_norm` and after `bn`.
    """
    x = nhwc(x)
    n, in_channels, h, w = x.shape
    channels, rows = weight.shape[0], n * h * w
    y = empty_nhwc(x, (n, channels, h, w))
    config = tuning.config(
        "pointwise_fwd", x, m=rows, n=channels, k=in_channels,
        fused=int(gate is not None or in_norm is not None),
    )  # fmt: skip
    tiles = triton.cdiv(rows, config["BM"])
    partial = empty_fp32(x, tiles, 4, channels) if statistics else None
    vec, in_units, out_units = units(in_channels, channels)
    act, bounds = activation_constants(activation)
    launch(
        pointwise_fwd_kernel, (tiles * triton.cdiv(channels, config["BN"]),), x.device,
        (x, weight.contiguous(), y, dense(gate), None if residual is None else nhwc(residual),
         in_norm, *map(dense, bn), eps, partial, *bounds,
         rows, h * w, in_units, out_units),
        config, VEC=vec, ACT=act, PRECISION=dot_precision(x.dtype),
    )  # fmt: skip
    return y, partial


def pointwise_bn_act_eval(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gate: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    backend: str,
) -> Tensor:
    """The op of this name."""
    return launch_pointwise_fwd(
        x, weight, gate=gate, bn=(bn_weight, bn_bias, mean, var), eps=eps,
        activation=activation, residual=residual,
    )[0]  # fmt: skip
