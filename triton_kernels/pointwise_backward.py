"""1x1 convolution with BatchNorm, backward: the gradients of its input and of its weight.

Computes: dz = scale * (du - mean(du) - zh * mean(du * zh)), du = row_scale[n] * grad, formed as
          grad and z are loaded; the means are absent in eval; for the head, whose pixels are
          averaged, du = q[n, c] * act'(u), without a grad;
          grad_x = dz weight + residual, and for an x = act(bn(z2)) * gate the sums per image and
          channel of e * a2, e * act'(u2), e * act'(u2) * zh2, with e = grad_x as stored;
          grad_weight = dz^T in(x), in(x) = x or act(bn(x)), times gate[n, c] where there is one;
          act is SiLU or clamp(lo, hi)
Shapes:   grad/z [N,Cout,H,W], q [N,Cout], weight [Cout,Cin], x/grad_x/z2 [N,Cin,H,W],
          gate [N,Cin], row_scale [N], sums [3,N,Cin]
Dtypes:   images fp32|fp16|bf16, weight x's or fp32; dz is rounded to x's dtype for the product;
          accumulation, sums and grad_weight fp32, fp32 products IEEE unless
          torch.backends.cuda.matmul allows tf32
Layout:   channels_last without gaps
Tiling:   grad_x: BM rows and BN input channels a program, BK output channels a step; tiles cross
          images, so the sums are kept by image within the tile. grad_weight: BN output and BK input
          channels and a run of rows a program, BM rows a step; the runs are folded in order
Bytes:    grad_x: grad, z and z2 once, grad_x once; grad_weight: grad, z and x once (from L2 for
          every tile but the first)
FLOPs:    2 * N*H*W * Cin * Cout each
Source:   original; Ioffe & Szegedy (arXiv 1502.03167), section 3, for dz
Truth:    tests/support/reference_passes.py
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .bn_act import image_of
from .elementwise import activated_with_slope, activation_slope, load_norm, load_vector
from .folds import fold_segments, fold_sums, segments_of
from .launching import (
    activation_constants,
    dense,
    dot_precision,
    empty_fp32,
    empty_nhwc,
    launch,
    nhwc,
    units,
)
from .pointwise_bn_act import load_operand

PROGRAMS = 512  # of the weight gradient: about two waves of a large GPU


@triton.jit
def load_dz(
    grad, q, z, norm, sums, inverse, row_scale, lo, hi, first, pixels, at, c, image, inside,
    c_inside, channels, ACT: tl.constexpr,
):  # fmt: skip
    """A tile [rows,C] of dz from row `first` on in fp32, 0 where it is not `inside`.

    One of grad and q is None.
    """
    start = first * channels
    value = tl.load(z + start + at, mask=inside, other=0.0).to(tl.float32)
    scale, shift, mean, rstd = load_norm(norm, channels, c, c_inside)
    if q is not None:
        own = (image - first // pixels).to(tl.int32)[:, None] * channels + c[None, :]
        du = activation_slope(value * scale[None, :] + shift[None, :], lo, hi, ACT)
        du *= tl.load(q + first // pixels * channels + own, mask=c_inside[None, :], other=0.0)
    else:
        du = tl.load(grad + start + at, mask=inside, other=0.0).to(tl.float32)
    if row_scale is not None:
        du *= tl.load(row_scale + image).to(tl.float32)[:, None]
    if sums is not None:
        du_mean = load_vector(sums, c, c_inside, 0.0) * inverse
        slope = load_vector(sums + channels, c, c_inside, 0.0) * inverse * rstd
        du = du - du_mean[None, :] - (value - mean[None, :]) * slope[None, :]
    return tl.where(inside, du * scale[None, :], 0.0)


@triton.jit
def store_image_sums(
    partial, e, z2, norm2, lo, hi, c, image, inside, c_inside, images, segments, channels,
    ACT: tl.constexpr,
):  # fmt: skip
    """The sums of e * a2, e * act'(u2), e * act'(u2) * zh2 over a tile's rows of each image."""
    scale, shift, mean, rstd = load_norm(norm2, channels, c, c_inside)
    a, slope = activated_with_slope(z2 * scale[None, :] + shift[None, :], lo, hi, ACT)
    by_a = tl.where(inside, e * a, 0.0)
    by_slope = tl.where(inside, e * slope, 0.0)
    by_zh = tl.where(inside, by_slope * ((z2 - mean[None, :]) * rstd[None, :]), 0.0)
    for segment in range(images):
        own = (image == segment)[:, None]
        out = partial + segment * 3 * channels + c
        tl.store(out, tl.sum(tl.where(own, by_a, 0.0), 0), mask=c_inside)
        tl.store(out + channels, tl.sum(tl.where(own, by_slope, 0.0), 0), mask=c_inside)
        tl.store(out + 2 * channels, tl.sum(tl.where(own, by_zh, 0.0), 0), mask=c_inside)


@triton.jit(do_not_specialize=[
    "inverse", "rows", "pixels", "segments", "in_units", "out_units",
])  # fmt: skip
def pointwise_bwd_data_kernel(
    grad, q, z, norm, sums, inverse, row_scale, weight, grad_x, residual, z2, norm2, partial,
    lo, hi, rows, pixels, segments, in_units, out_units,
    VEC: tl.constexpr, PRECISION: tl.constexpr, ACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """grad_x [rows,Cin], and partial [tiles,segments,3,Cin] where it is given."""
    in_channels, channels = in_units * VEC, out_units * VEC
    tiles = tl.cdiv(in_channels, BN)
    tile = tl.program_id(0) // tiles
    first = tile.to(tl.int64) * BM
    row = tl.arange(0, BM)
    row_inside = row < rows - first
    n = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    n_inside = n < in_channels
    last = tl.minimum(rows - 1, first + BM - 1)
    image = tl.minimum(image_of(first, row, pixels), last // pixels)
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, channels, BK):
        k = k0 + tl.arange(0, BK)
        k_inside = k < channels
        dz = load_dz(
            grad, q, z, norm, sums, inverse, row_scale, lo, hi, first, pixels,
            row[:, None] * channels + k[None, :], k, image,
            row_inside[:, None] & k_inside[None, :], k_inside, channels, ACT,
        )  # fmt: skip
        b = tl.load(
            weight + k[:, None] * in_channels + n[None, :],
            mask=k_inside[:, None] & n_inside[None, :], other=0.0,
        )  # fmt: skip
        a = dz.to(grad_x.dtype.element_ty)
        acc = tl.dot(a, b.to(grad_x.dtype.element_ty), acc, input_precision=PRECISION)
    inside = row_inside[:, None] & n_inside[None, :]
    at = row[:, None] * in_channels + n[None, :]
    start = first * in_channels
    if residual is not None:
        acc += tl.load(residual + start + at, mask=inside, other=0.0).to(tl.float32)
    stored = acc.to(grad_x.dtype.element_ty)
    tl.store(grad_x + start + at, stored, mask=inside)
    if partial is not None:
        before = tl.load(z2 + start + at, mask=inside, other=0.0).to(tl.float32)
        store_image_sums(
            partial + tile.to(tl.int64) * segments * 3 * in_channels, stored.to(tl.float32),
            before, norm2, lo, hi, n, image - first // pixels, inside, n_inside,
            (last // pixels - first // pixels + 1).to(tl.int32), segments, in_channels, ACT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["inverse", "rows", "run", "pixels", "in_units", "out_units"])
def pointwise_bwd_weight_kernel(
    grad, q, z, norm, sums, inverse, row_scale, x, in_norm, gate, partial,
    lo, hi, rows, run, pixels, in_units, out_units,
    VEC: tl.constexpr, PRECISION: tl.constexpr, ACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial [runs,Cout,Cin]: dz^T in(x) over runs of rows."""
    in_channels, channels = in_units * VEC, out_units * VEC
    tiles = tl.cdiv(in_channels, BK)
    n = (tl.program_id(0) // tiles) * BN + tl.arange(0, BN)
    n_inside = n < channels
    k = (tl.program_id(0) % tiles) * BK + tl.arange(0, BK)
    k_inside = k < in_channels
    row = tl.arange(0, BM)
    begin = tl.program_id(1).to(tl.int64) * run
    acc = tl.zeros([BN, BK], tl.float32)
    for offset in range(0, run, BM):
        first = begin + offset
        row_inside = row < rows - first
        image = tl.minimum(image_of(first, row, pixels), (rows - 1) // pixels)
        dz = load_dz(
            grad, q, z, norm, sums, inverse, row_scale, lo, hi, first, pixels,
            row[:, None] * channels + n[None, :], n, image,
            row_inside[:, None] & n_inside[None, :], n_inside, channels, ACT,
        )  # fmt: skip
        at = row[:, None] * in_channels + k[None, :]
        inside = row_inside[:, None] & k_inside[None, :]
        a = load_operand(
            x + first * in_channels, gate, in_norm, lo, hi, at, k, image, inside, k_inside,
            in_channels, ACT,
        )  # fmt: skip
        acc = tl.dot(
            tl.trans(dz.to(x.dtype.element_ty)), a.to(x.dtype.element_ty), acc,
            input_precision=PRECISION,
        )  # fmt: skip
    out = partial + tl.program_id(1).to(tl.int64) * channels * in_channels
    inside = n_inside[:, None] & k_inside[None, :]
    tl.store(out + n[:, None] * in_channels + k[None, :], acc, mask=inside)


def launch_pointwise_bwd_data(
    grad: Tensor | None,
    z: Tensor,
    norm: Tensor,
    sums: Tensor | None,
    weight: Tensor,
    activation: str,
    *,
    q: Tensor | None = None,
    row_scale: Tensor | None = None,
    residual: Tensor | None = None,
    z2: Tensor | None = None,
    norm2: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """grad_x [N,Cin,H,W] as the file's head says, and the sums [3,N,Cin] where z2 is given.

    Args:
        grad: the gradient of u, or None with q.
        q: [N,Cout], of which the gradient of u is q * act'(u).
        activation: act, of u with q and of bn(z2).
        norm, sums: of the BN behind the convolution; sums are the totals [2,Cout] of du and
            du * zh, None where it does not normalise by the batch.
        residual: like grad_x, added.
    """
    grad, z = None if grad is None else nhwc(grad), nhwc(z)
    n, channels, h, w = z.shape
    in_channels, rows, pixels = weight.shape[1], n * h * w, h * w
    grad_x = empty_nhwc(z, (n, in_channels, h, w))
    config = tuning.config("pointwise_bwd_data", z, m=rows, n=in_channels, k=channels)
    tiles = triton.cdiv(rows, config["BM"])
    segments = segments_of(pixels, config["BM"]) if rows else 1
    partial = None if z2 is None else empty_fp32(z, tiles, segments, 3, in_channels)
    act, bounds = activation_constants(activation)
    vec, in_units, out_units = units(in_channels, channels)
    launch(
        pointwise_bwd_data_kernel, (tiles * triton.cdiv(in_channels, config["BN"]),), z.device,
        (grad, dense(q), z, norm, sums, 1.0 / max(rows, 1), dense(row_scale),
         weight.contiguous(), grad_x, None if residual is None else nhwc(residual),
         None if z2 is None else nhwc(z2), norm2, partial, *bounds, rows, pixels, segments,
         in_units, out_units),
        config, VEC=vec, PRECISION=dot_precision(z.dtype), ACT=act,
    )  # fmt: skip
    if partial is None:
        return grad_x, None
    return grad_x, fold_segments(partial, n, pixels, config["BM"])


def launch_pointwise_bwd_weight(
    grad: Tensor | None,
    z: Tensor,
    norm: Tensor,
    sums: Tensor | None,
    x: Tensor,
    activation: str,
    *,
    q: Tensor | None = None,
    row_scale: Tensor | None = None,
    in_norm: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """grad_weight [Cout,Cin] in fp32; the arguments as of `launch_pointwise_bwd_data`.

    Args:
        x: [N,Cin,H,W], what the product read before `in_norm`, act and `gate` [N,Cin].
    """
    grad, z, x = None if grad is None else nhwc(grad), nhwc(z), nhwc(x)
    n, channels, h, w = z.shape
    in_channels, rows = x.shape[1], n * h * w
    config = tuning.config("pointwise_bwd_weight", z, m=rows, n=channels, k=in_channels)
    tiles = triton.cdiv(channels, config["BN"]) * triton.cdiv(in_channels, config["BK"])
    steps = triton.cdiv(rows, config["BM"])
    run = triton.cdiv(steps, max(1, min(PROGRAMS // tiles, triton.cdiv(steps, 4))))
    runs = triton.cdiv(steps, max(1, run))
    partial = empty_fp32(z, 1, runs, channels * in_channels)
    act, bounds = activation_constants(activation)
    vec, in_units, out_units = units(in_channels, channels)
    launch(
        pointwise_bwd_weight_kernel, (tiles, runs), z.device,
        (grad, dense(q), z, norm, sums, 1.0 / max(rows, 1), dense(row_scale), x, in_norm,
         dense(gate), partial, *bounds, rows, run * config["BM"], h * w, in_units, out_units),
        config, VEC=vec, PRECISION=dot_precision(z.dtype), ACT=act,
    )  # fmt: skip
    return fold_sums(partial).view(channels, in_channels)
