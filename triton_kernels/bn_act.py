"""BatchNorm's passes over a stored tensor: forward, the sums of its backward, and dz.

Computes: y = act(bn(z)) * row_scale[n] + residual, act being SiLU or clamp(lo, hi);
          sums of du and du * zh over all rows, with du = row_scale * grad * act'(u);
          dz = scale * (du - mean(du) - zh * mean(du * zh)), the means absent in eval, with
          du = (grad * gate[n, c] + offset[n, c]) * act'(u)
Shapes:   z, grad, residual, y, dz [M,C] with M = N*H*W; row_scale [N], gate and offset
          [N,C], sums [2,C]
Dtypes:   z/grad/y/dz fp32|fp16|bf16; vectors any; accumulation fp32
Layout:   channels_last without gaps
Tiling:   a program owns BP rows and BC channels, in the sums a run of up to RUN rows; 8 channels a
          thread in 16-bit types for accesses of 128 bits
Bytes:    every tensor once
FLOPs:    about 10 per element forward, 30 backward
Source:   Ioffe & Szegedy (arXiv 1502.03167), section 3
Truth:    effnet_fast/reference/dwconv_bn_silu.py
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .elementwise import (
    activated,
    add_exactly,
    grad_through,
    load_norm,
    load_vector,
    sum_rows,
)
from .folds import fold_sums
from .launching import (
    activation_constants,
    dense,
    empty_fp32,
    empty_nhwc,
    launch,
    nhwc,
    units,
)


@triton.jit
def tile_of(rows, channels, BP: tl.constexpr, BC: tl.constexpr):
    """First row, rows and channels of this program's tile, and what of them exists."""
    tiles = tl.cdiv(channels, BC)
    first = (tl.program_id(0) // tiles).to(tl.int64) * BP
    c = (tl.program_id(0) % tiles) * BC + tl.arange(0, BC)
    row = tl.arange(0, BP)
    return first, row, c, row < rows - first, c < channels


@triton.jit
def image_of(first, row, pixels):
    """The image of rows first + row."""
    return first // pixels + ((first % pixels).to(tl.int32) + row) // pixels


@triton.jit(do_not_specialize=["rows", "pixels", "channel_units"])
def bn_act_fwd_kernel(
    z, y, norm, row_scale, residual, lo, hi, rows, pixels, channel_units,
    VEC: tl.constexpr, ACT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    channels = channel_units * VEC
    first, row, c, row_inside, c_inside = tile_of(rows, channels, BP, BC)
    inside = row_inside[:, None] & c_inside[None, :]
    at = row[:, None] * channels + c[None, :]
    start = first * channels
    value = tl.load(z + start + at, mask=inside, other=0.0).to(tl.float32)
    scale, shift, _, _ = load_norm(norm, channels, c, c_inside)
    value = activated(value * scale[None, :] + shift[None, :], lo, hi, ACT)
    if row_scale is not None:
        image = image_of(first, row, pixels)
        value *= tl.load(row_scale + image, mask=row_inside, other=0.0).to(tl.float32)[:, None]
    if residual is not None:
        value += tl.load(residual + start + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + start + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "pixels", "channel_units", "RUN"])
def bn_sums_kernel(
    grad, z, partial, norm, row_scale, lo, hi, rows, pixels, channel_units,
    RUN, VEC: tl.constexpr, ACT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """partial [runs,2,C]: sums of du and du * zh over runs of rows.

    The terms of du * zh may outweigh their sum by far: what rounding takes from it is kept.
    """
    channels = channel_units * VEC
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    c_inside = c < channels
    start = tl.program_id(0).to(tl.int64) * RUN
    row = tl.arange(0, BP)
    scale, shift, mean, rstd = load_norm(norm, channels, c, c_inside)
    du_sum = tl.zeros([BP, BC], tl.float32)
    product_sum, product_rest = du_sum, du_sum
    for begin in range(0, RUN, BP):
        first = start + begin
        row_inside = row < rows - first
        inside = row_inside[:, None] & c_inside[None, :]
        at = row[:, None] * channels + c[None, :]
        value = tl.load(z + first * channels + at, mask=inside, other=0.0).to(tl.float32)
        du = tl.load(grad + first * channels + at, mask=inside, other=0.0).to(tl.float32)
        du = grad_through(du, value * scale[None, :] + shift[None, :], lo, hi, ACT)
        if row_scale is not None:
            image = image_of(first, row, pixels)
            du *= tl.load(row_scale + image, mask=row_inside, other=0.0).to(tl.float32)[:, None]
        du = tl.where(inside, du, 0.0)
        du_sum += du
        product = tl.where(inside, du * ((value - mean[None, :]) * rstd[None, :]), 0.0)
        product_sum, product_rest = add_exactly(product_sum, product_rest, product)
    out = partial + tl.program_id(0).to(tl.int64) * 2 * channels + c
    tl.store(out, sum_rows(du_sum, 0.0), mask=c_inside)
    tl.store(out + channels, sum_rows(product_sum, product_rest), mask=c_inside)


@triton.jit(do_not_specialize=["inverse", "rows", "pixels", "channel_units"])
def bn_act_bwd_kernel(
    grad, z, dz, norm, sums, inverse, gate, offset, lo, hi,
    rows, pixels, channel_units,
    VEC: tl.constexpr, ACT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dz of grad, with the totals sums [2,C] of du and du * zh, times `inverse` their means."""
    channels = channel_units * VEC
    first, row, c, row_inside, c_inside = tile_of(rows, channels, BP, BC)
    inside = row_inside[:, None] & c_inside[None, :]
    at = row[:, None] * channels + c[None, :]
    start = first * channels
    scale, shift, mean, rstd = load_norm(norm, channels, c, c_inside)
    value = tl.load(z + start + at, mask=inside, other=0.0).to(tl.float32)
    du = tl.load(grad + start + at, mask=inside, other=0.0).to(tl.float32)
    if gate is not None:
        vector_at = image_of(first, row, pixels)[:, None] * channels + c[None, :]
        du *= tl.load(gate + vector_at, mask=inside, other=0.0)
        du += tl.load(offset + vector_at, mask=inside, other=0.0)
    du = grad_through(du, value * scale[None, :] + shift[None, :], lo, hi, ACT)
    if sums is not None:
        du_mean = load_vector(sums, c, c_inside, 0.0) * inverse
        slope = load_vector(sums + channels, c, c_inside, 0.0) * inverse
        zh = (value - mean[None, :]) * rstd[None, :]
        du = du - du_mean[None, :] - zh * slope[None, :]
    tl.store(dz + start + at, (du * scale[None, :]).to(dz.dtype.element_ty), mask=inside)


def _sizes(z: Tensor) -> tuple[int, int, int]:
    n, c, h, w = z.shape
    return n * h * w, h * w, c


def _grid(rows: int, channels: int, config: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(rows, config["BP"]) * triton.cdiv(channels, config["BC"]),)


def launch_bn_act_fwd(
    z: Tensor,
    norm: Tensor,
    activation: str,
    row_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = act(bn(z)) * row_scale + residual, like z [N,C,H,W]; norm is of `folds.launch_norm`.

    Args:
        row_scale: [N], what drop-path multiplies each image with, or None.
        residual: like z, or None.
        out: where y goes, NHWC without gaps; it may be z.
    """
    z = nhwc(z)
    y = empty_nhwc(z, z.shape) if out is None else out
    rows, pixels, channels = _sizes(z)
    act, bounds = activation_constants(activation)
    config = tuning.config("bn_act", z, c=channels)
    vec, channel_units = units(channels)
    launch(
        bn_act_fwd_kernel, _grid(rows, channels, config), z.device,
        (z, y, norm, dense(row_scale), None if residual is None else nhwc(residual), *bounds,
         rows, pixels, channel_units),
        config, VEC=vec, ACT=act,
    )  # fmt: skip
    return y


def launch_bn_sums(
    grad: Tensor,
    z: Tensor,
    norm: Tensor,
    activation: str,
    row_scale: Tensor | None = None,
) -> Tensor:
    """Sums [2,C], fp32, of du and du * zh with du = row_scale * grad * act'(u)."""
    z, grad = nhwc(z), nhwc(grad)
    rows, pixels, channels = _sizes(z)
    act, bounds = activation_constants(activation)
    config = tuning.config("bn_sums", z, c=channels, m=rows)
    runs = triton.cdiv(rows, config["RUN"])
    partial = empty_fp32(z, 1, runs, 2 * channels)
    vec, channel_units = units(channels)
    launch(
        bn_sums_kernel, (runs, triton.cdiv(channels, config["BC"])), z.device,
        (grad, z, partial, norm, dense(row_scale), *bounds, rows, pixels, channel_units),
        config, VEC=vec, ACT=act,
    )  # fmt: skip
    return fold_sums(partial).view(2, channels)


def launch_bn_act_bwd(
    grad: Tensor,
    z: Tensor,
    norm: Tensor,
    activation: str,
    sums: Tensor | None,
    *,
    gate: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """dz like z [N,C,H,W] from the gradient of act(bn(z)).

    Args:
        sums: totals [2,C] of du and du * zh over all of z in training, None in eval.
        gate, offset: [N,C] fp32, both or neither: the gradient is grad * gate + offset.
    """
    z, grad = nhwc(z), nhwc(grad)
    dz = empty_nhwc(z, z.shape)
    rows, pixels, channels = _sizes(z)
    act, bounds = activation_constants(activation)
    config = tuning.config("bn_act", z, c=channels)
    vec, channel_units = units(channels)
    launch(
        bn_act_bwd_kernel, _grid(rows, channels, config), z.device,
        (grad, z, dz, norm, dense(sums), 1.0 / max(rows, 1),
         dense(gate), dense(offset), *bounds, rows, pixels, channel_units),
        config, VEC=vec, ACT=act,
    )  # fmt: skip
    return dz
