"""The stem: a small dense convolution, BatchNorm and activation, forward and its weight's gradient.

Computes: z = conv(x, weight); z and its (count, mean, M2) by tile, or y = act(bn(z));
          grad_weight = sum over pixels of dz x^T, formed as grad and z are loaded:
          dz = scale * (du - mean(du) - zh * mean(du * zh)), du = grad * act'(u), the means
          absent in eval; act is SiLU or clamp(lo, hi)
Shapes:   x [N,Cin,H,W], weight and grad_weight [Cout,Cin,Kh,Kw], z/y/grad [N,Cout,Ho,Wo]
Dtypes:   images fp32|fp16|bf16, weight x's or fp32, vectors any; dz is rounded to x's dtype for the
          product; accumulation and grad_weight fp32, fp32 products IEEE unless
          torch.backends.cuda.matmul allows tf32
Layout:   x with any strides; z, y and grad channels_last without gaps
Tiling:   an implicit matrix product: a row is an output pixel, a column of the operand a tap
          (ky, kx, cin), whose values are gathered from x. Forward: BM pixels and BN channels a
          program, BK taps a step. Gradient: BN channels, BK taps and a run of pixels a program, BM
          pixels a step; the runs are folded in order
Bytes:    forward x once (its taps again from L1 and L2), z or y once; gradient grad, z and x once
FLOPs:    2 * Kh * Kw * Cin per element of z each; about 30 more where SiLU or its slope is taken
Source:   Tan & Le (arXiv 1905.11946), table 1; Ioffe & Szegedy (arXiv 1502.03167), section 3
Truth:    effnet_fast/reference/stem_conv_bn_silu.py
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .bn_act import launch_bn_act_bwd, launch_bn_act_fwd, launch_bn_sums
from .elementwise import (
    activated,
    grad_through,
    load_affine,
    load_norm,
    load_vector,
    store_statistics,
    tile_statistics,
)
from .folds import fold_norm, fold_sums, launch_norm
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

PROGRAMS = 512  # of the weight gradient: about two waves of a large GPU


@triton.jit
def origins(
    first, row, pixels, columns, stride_h, stride_w, top, left, n_step, h_step, w_step
):  # fmt: skip
    """Of the output pixels first + row: x's row and column under tap (0, 0), and its offset."""
    within = (first % pixels).to(tl.int32) + row
    image = first // pixels + within // pixels
    within = within % pixels
    h = within // columns * stride_h - top
    w = within % columns * stride_w - left
    return h, w, image * n_step + h.to(tl.int64) * h_step + w.to(tl.int64) * w_step


@triton.jit
def load_taps(
    x, h, w, origin, row_inside, k, height, width, c_step, h_step, w_step,
    CIN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """The operand [BM,BK]: x's values under taps k, 0 outside of x."""
    ky, kx, c = k // (CIN * KW), k // CIN % KW, k % CIN
    at_h, at_w = h[:, None] + ky[None, :], w[:, None] + kx[None, :]
    inside = row_inside[:, None] & (k < CIN * KH * KW)[None, :]
    inside = inside & (at_h >= 0) & (at_h < height) & (at_w >= 0) & (at_w < width)
    offset = ky.to(tl.int64) * h_step + kx.to(tl.int64) * w_step + c.to(tl.int64) * c_step
    return tl.load(x + origin[:, None] + offset[None, :], mask=inside, other=0.0)


@triton.jit
def weight_offset(k, CIN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr):
    """Where taps k lie in a row [Cin,Kh,Kw] of the weight."""
    return k % CIN * (KH * KW) + k // CIN


@triton.jit(do_not_specialize=[
    "eps", "rows", "pixels", "columns", "height", "width", "n_step", "c_step", "h_step", "w_step",
    "stride_h", "stride_w", "top", "left", "out_units",
])  # fmt: skip
def stem_fwd_kernel(
    x, weight, y, bn_weight, bn_bias, mean, var, eps, partial, lo, hi,
    rows, pixels, columns, height, width, n_step, c_step, h_step, w_step,
    stride_h, stride_w, top, left, out_units,
    CIN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, VEC: tl.constexpr,
    ACT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [rows,Cout], and where partial [tiles,4,Cout] is given the statistics of y's tiles."""
    channels = out_units * VEC
    tiles = tl.cdiv(channels, BN)
    tile = tl.program_id(0) // tiles
    first = tile.to(tl.int64) * BM
    row = tl.arange(0, BM)
    row_inside = row < rows - first
    n = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    n_inside = n < channels
    h, w, origin = origins(
        first, row, pixels, columns, stride_h, stride_w, top, left, n_step, h_step, w_step
    )
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, CIN * KH * KW, BK):
        k = k0 + tl.arange(0, BK)
        a = load_taps(
            x, h, w, origin, row_inside, k, height, width, c_step, h_step, w_step, CIN, KH, KW
        )
        at = weight_offset(k, CIN, KH, KW)[:, None] + n[None, :] * (CIN * KH * KW)
        inside = (k < CIN * KH * KW)[:, None] & n_inside[None, :]
        b = tl.load(weight + at, mask=inside, other=0.0).to(x.dtype.element_ty)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if mean is not None:
        centre, scale, shift = load_affine(bn_weight, bn_bias, mean, var, eps, n, n_inside)
        acc = activated((acc - centre[None, :]) * scale[None, :] + shift[None, :], lo, hi, ACT)
    inside = row_inside[:, None] & n_inside[None, :]
    stored = acc.to(y.dtype.element_ty)
    tl.store(y + first * channels + row[:, None] * channels + n[None, :], stored, mask=inside)
    if partial is not None:
        count = tl.minimum(rows - first, BM).to(tl.float32)
        tile_mean, squares, rest = tile_statistics(stored.to(tl.float32), inside, count)
        store_statistics(partial, tile, count, tile_mean, squares, rest, channels, n, n_inside)


@triton.jit
def load_dz(
    grad, z, norm, sums, inverse, lo, hi, at, n, inside, n_inside, channels, ACT: tl.constexpr
):
    """A tile [rows,Cout] of dz in fp32, 0 where it is not `inside`."""
    scale, shift, mean, rstd = load_norm(norm, channels, n, n_inside)
    value = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    du = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    du = grad_through(du, value * scale[None, :] + shift[None, :], lo, hi, ACT)
    if sums is not None:
        du_mean = load_vector(sums, n, n_inside, 0.0) * inverse
        slope = load_vector(sums + channels, n, n_inside, 0.0) * inverse
        zh = (value - mean[None, :]) * rstd[None, :]
        du = du - du_mean[None, :] - zh * slope[None, :]
    return tl.where(inside, du * scale[None, :], 0.0)


@triton.jit(do_not_specialize=[
    "inverse", "rows", "run", "pixels", "columns", "height", "width", "n_step", "c_step", "h_step",
    "w_step", "stride_h", "stride_w", "top", "left", "out_units",
])  # fmt: skip
def stem_bwd_weight_kernel(
    grad, z, norm, sums, inverse, x, partial, lo, hi,
    rows, run, pixels, columns, height, width, n_step, c_step, h_step, w_step,
    stride_h, stride_w, top, left, out_units,
    CIN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, VEC: tl.constexpr,
    ACT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial [runs,Cout,Cin,Kh,Kw]: dz^T x over runs of rows."""
    channels = out_units * VEC
    tiles = tl.cdiv(CIN * KH * KW, BK)
    n = (tl.program_id(0) // tiles) * BN + tl.arange(0, BN)
    n_inside = n < channels
    k = (tl.program_id(0) % tiles) * BK + tl.arange(0, BK)
    row = tl.arange(0, BM)
    begin = tl.program_id(1).to(tl.int64) * run
    acc = tl.zeros([BN, BK], tl.float32)
    for offset in range(0, run, BM):
        first = begin + offset
        row_inside = row < rows - first
        h, w, origin = origins(
            first, row, pixels, columns, stride_h, stride_w, top, left, n_step, h_step, w_step
        )
        dz = load_dz(
            grad + first * channels, z + first * channels, norm, sums, inverse,
            lo, hi, row[:, None] * channels + n[None, :], n,
            row_inside[:, None] & n_inside[None, :], n_inside, channels, ACT,
        )  # fmt: skip
        a = load_taps(
            x, h, w, origin, row_inside, k, height, width, c_step, h_step, w_step, CIN, KH, KW
        )
        acc = tl.dot(tl.trans(dz.to(x.dtype.element_ty)), a, acc, input_precision=PRECISION)
    size = CIN * KH * KW
    out = partial + tl.program_id(1).to(tl.int64) * channels * size
    at = n[:, None] * size + weight_offset(k, CIN, KH, KW)[None, :]
    tl.store(out + at, acc, mask=n_inside[:, None] & (k < size)[None, :])


def _output_shape(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    left, right, top, bottom = padding
    return (
        x.shape[0],
        weight.shape[0],
        (x.shape[2] + top + bottom - weight.shape[2]) // stride[0] + 1,
        (x.shape[3] + left + right - weight.shape[3]) // stride[1] + 1,
    )


def _geometry(
    x: Tensor, z: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    """The kernels' sizes from `pixels` to `left`."""
    return (
        z.shape[2] * z.shape[3], z.shape[3], *x.shape[2:], *x.stride(),
        *stride, padding[2], padding[0],
    )  # fmt: skip


def launch_stem_fwd(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    bn: BatchNorm = NO_BN,
    eps: float = 0.0,
    activation: str = "identity",
    statistics: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y [N,Cout,Ho,Wo] as the file's head says, and partial statistics [tiles,4,Cout] if asked for.

    Args:
        stride: over rows and columns.
        padding: (left, right, top, bottom).
        bn, eps: BN and activation are applied to the product where the mean is given.
    """
    y = empty_nhwc(x, _output_shape(x, weight, stride, padding))
    n, channels, oh, ow = y.shape
    taps, rows = weight[0].numel(), n * oh * ow
    config = tuning.config("stem_fwd", x, m=rows, n=channels, k=taps)
    tiles = triton.cdiv(rows, config["BM"])
    partial = empty_fp32(x, tiles, 4, channels) if statistics else None
    vec, out_units = units(channels)
    act, bounds = activation_constants(activation)
    launch(
        stem_fwd_kernel, (tiles * triton.cdiv(channels, config["BN"]),), x.device,
        (x, weight.contiguous(), y, *map(dense, bn), eps, partial, *bounds,
         rows, *_geometry(x, y, stride, padding), out_units),
        config, CIN=x.shape[1], KH=weight.shape[2], KW=weight.shape[3], VEC=vec,
        ACT=act, PRECISION=dot_precision(x.dtype),
    )  # fmt: skip
    return y, partial


def stem_conv_bn_silu_eval(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    eps: float,
    activation: str,
    backend: str,
) -> Tensor:
    """The op of this name."""
    bn = (bn_weight, bn_bias, mean, var)
    return launch_stem_fwd(x, weight, stride, padding, bn=bn, eps=eps, activation=activation)[0]


def stem_conv(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The op of this name."""
    z, partial = launch_stem_fwd(x, weight, stride, padding, statistics=mean is None)
    if mean is not None and var is not None:
        return z, launch_norm(bn_weight, bn_bias, mean, var, eps)
    assert partial is not None
    return z, fold_norm(partial, bn_weight, bn_bias, eps)


def norm_silu(z: Tensor, norm: Tensor, activation: str, backend: str) -> Tensor:
    """The op of this name."""
    return launch_bn_act_fwd(z, norm, activation)


def norm_silu_sums(
    grad_y: Tensor, z: Tensor, norm: Tensor, activation: str, backend: str
) -> Tensor:
    """The op of this name."""
    return launch_bn_sums(grad_y, z, norm, activation)


def norm_silu_backward(
    grad_y: Tensor, z: Tensor, norm: Tensor, sums: Tensor | None, activation: str, backend: str
) -> Tensor:
    """The op of this name."""
    return launch_bn_act_bwd(grad_y, z, norm, activation, sums)


def stem_weight_backward(
    grad_y: Tensor,
    z: Tensor,
    norm: Tensor,
    sums: Tensor | None,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    activation: str,
    backend: str,
) -> Tensor:
    """The op of this name."""
    grad_y, z = nhwc(grad_y), nhwc(z)
    n, channels, oh, ow = z.shape
    taps, rows = weight[0].numel(), n * oh * ow
    config = tuning.config("stem_bwd_weight", z, m=rows, n=channels, k=taps)
    tiles = triton.cdiv(channels, config["BN"]) * triton.cdiv(taps, config["BK"])
    steps = triton.cdiv(rows, config["BM"])
    run = triton.cdiv(steps, max(1, min(PROGRAMS // tiles, triton.cdiv(steps, 4))))
    runs = triton.cdiv(steps, max(1, run))
    partial = empty_fp32(z, 1, runs, channels * taps)
    vec, out_units = units(channels)
    act, bounds = activation_constants(activation)
    launch(
        stem_bwd_weight_kernel, (tiles, runs), z.device,
        (grad_y, z, norm, sums, 1.0 / max(rows, 1), x, partial, *bounds,
         rows, run * config["BM"], *_geometry(x, z, stride, padding), out_units),
        config, CIN=x.shape[1], KH=weight.shape[2], KW=weight.shape[3], VEC=vec,
        ACT=act, PRECISION=dot_precision(z.dtype),
    )  # fmt: skip
    return fold_sums(partial).view(weight.shape)
