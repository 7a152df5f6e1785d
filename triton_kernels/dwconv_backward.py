"""Depthwise convolution, backward: the gradients of its input and of its weight from dz.

Computes: da = conv_transpose(dz, weight); grad_x = da + residual, or with BN and act before the
          convolution f = da * act'(u) + residual and the sums of f and f * zh;
          grad_weight = correlate(in(x), dz), in(x) = x or act(bn(x)); act
          is SiLU or clamp(lo, hi)
Shapes:   dz [N,C,Ho,Wo], x and f [N,C,H,W], weight [C,1,K,K], sums [2,C]
Dtypes:   dz/x/f fp32|fp16|bf16, weight x's or fp32; accumulation, grad_weight and sums fp32
Layout:   channels_last; x with any strides over N, H, W, the others without gaps
Tiling:   a program owns BC channels. For f it goes through RUN pixels of x, BP at a time, and loops
          over the taps; for one row kh of the weight through a share of those pixels of x that the
          row reads, so that SiLU is formed once per pixel and row, not once per tap
Bytes:    dz and x once per gradient (the taps' and the rows' later visits come from cache), f once
FLOPs:    2 * K * K per pixel and gradient at stride 1
Source:   original
Truth:    effnet_fast/reference/dwconv_bn_silu.py
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .elementwise import activated, grad_through, load_norm
from .folds import fold_sums
from .launching import (
    activation_constants,
    empty_fp32,
    empty_nhwc,
    launch,
    nhwc,
    pixel_strides,
    units,
)

PROGRAMS = 2048  # of the weight gradient: a GPU's worth, and few enough partials


@triton.jit(do_not_specialize=[
    "pixels", "height", "width", "out_height", "out_width", "channel_units", "left", "top", "RUN",
])  # fmt: skip
def dwconv_bwd_data_kernel(
    dz, weight, grad_x, z, norm, residual, partial, lo, hi,
    pixels, height, width, out_height, out_width, channel_units, left, top, RUN,
    VEC: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, ACT: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """grad_x [pixels,C] of dz; z is the BN's input, laid out like grad_x; partial [runs,2,C]."""
    channels = channel_units * VEC
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    c_inside = c < channels
    if norm is not None:
        scale, shift, mean, rstd = load_norm(norm, channels, c, c_inside)
        f_sum = tl.zeros([BP, BC], tl.float32)
        product_sum = tl.zeros([BP, BC], tl.float32)
    for begin in range(0, RUN, BP):
        pixel = tl.program_id(0).to(tl.int64) * RUN + begin + tl.arange(0, BP)
        exists = pixel < pixels
        iw = (pixel % width).to(tl.int32)
        ih = (pixel // width % height).to(tl.int32)
        image_row = pixel // width // height * out_height
        acc = tl.zeros([BP, BC], tl.float32)
        for tap in range(K * K):
            oh = ih + (top - tap // K)
            ow = iw + (left - tap % K)
            inside = exists & (oh >= 0) & (ow >= 0)
            if STRIDE != 1:
                inside = inside & (oh % STRIDE == 0) & (ow % STRIDE == 0)
                oh = oh // STRIDE
                ow = ow // STRIDE
            inside = inside & (oh < out_height) & (ow < out_width)
            at = ((image_row + oh) * out_width + ow)[:, None] * channels + c[None, :]
            value = tl.load(dz + at, mask=inside[:, None] & c_inside[None, :], other=0.0)
            factor = tl.load(weight + tap * channels + c, mask=c_inside, other=0.0)
            acc += value.to(tl.float32) * factor[None, :]
        inside = exists[:, None] & c_inside[None, :]
        at = pixel[:, None] * channels + c[None, :]
        if norm is not None:
            value = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
            acc = grad_through(acc, value * scale[None, :] + shift[None, :], lo, hi, ACT)
            f = tl.where(inside, acc.to(grad_x.dtype.element_ty).to(tl.float32), 0.0)
            f_sum += f
            product_sum += tl.where(inside, f * ((value - mean[None, :]) * rstd[None, :]), 0.0)
        if residual is not None:
            acc += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + at, acc.to(grad_x.dtype.element_ty), mask=inside)
    if norm is not None:
        out = partial + tl.program_id(0).to(tl.int64) * 2 * channels + c
        tl.store(out, tl.sum(f_sum, 0), mask=c_inside)
        tl.store(out + channels, tl.sum(product_sum, 0), mask=c_inside)


@triton.jit(do_not_specialize=[
    "stride_n", "stride_h", "stride_w", "pixels", "run", "height", "width", "out_height",
    "out_width", "channel_units", "left", "top",
])  # fmt: skip
def dwconv_bwd_weight_kernel(
    dz, x, partial, norm, lo, hi, stride_n, stride_h, stride_w,
    pixels, run, height, width, out_height, out_width, channel_units, left, top,
    VEC: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, ACT: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """partial [runs,K*K,C]; a pixel is an image, a row of dz and a column of x.

    stride_n, stride_h and stride_w are in units of VEC values.
    """
    channels = channel_units * VEC
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    c_inside = c < channels
    kh = tl.program_id(2)
    if norm is not None:
        scale, shift, _, _ = load_norm(norm, channels, c, c_inside)
    accs = (tl.zeros([BP, BC], tl.float32),) * K
    start = tl.program_id(0).to(tl.int64) * run
    for begin in range(0, run, BP):
        pixel = start + begin + tl.arange(0, BP)
        iw = (pixel % width).to(tl.int32)
        dz_row = pixel // width
        n = dz_row // out_height
        ih = (dz_row % out_height).to(tl.int32) * STRIDE - top + kh
        exists = (pixel < pixels) & (ih >= 0) & (ih < height)
        at = (n * stride_n + ih.to(tl.int64) * stride_h + iw.to(tl.int64) * stride_w) * VEC
        inside = exists[:, None] & c_inside[None, :]
        a = tl.load(x + at[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
        if norm is not None:
            a = activated(a * scale[None, :] + shift[None, :], lo, hi, ACT)
            a = tl.where(inside, a, 0.0)
        added = ()
        for kw in tl.static_range(K):
            ow = iw + (left - kw)
            reads = exists & (ow >= 0)
            if STRIDE != 1:
                reads = reads & (ow % STRIDE == 0)
                ow = ow // STRIDE
            reads = reads & (ow < out_width)
            at = (dz_row * out_width + ow)[:, None] * channels + c[None, :]
            value = tl.load(dz + at, mask=reads[:, None] & c_inside[None, :], other=0.0)
            # What no output reads may be NaN without harm.
            product = tl.where(reads[:, None], a * value.to(tl.float32), 0.0)
            added = added + (accs[kw] + product,)
        accs = added
    for kw in tl.static_range(K):
        out = partial + ((tl.program_id(0).to(tl.int64) * K + kh) * K + kw) * channels + c
        tl.store(out, tl.sum(accs[kw], 0), mask=c_inside)


def taps(weight: Tensor) -> Tensor:
    """weight [C,1,K,K] as [K*K,C] in fp32: the channels of a tap side by side."""
    channels = weight.shape[0]
    out = empty_fp32(weight, weight.shape[2] * weight.shape[3], channels)
    return out.copy_(weight.detach().reshape(channels, -1).t())


def launch_dwconv_bwd_data(
    dz: Tensor,
    weight: Tensor,
    x: Tensor,
    stride: int,
    padding: Sequence[int],
    *,
    norm: Tensor | None = None,
    activation: str = "identity",
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the convolution's input, or of the BN in front of it.

    Args:
        x: [N,C,H,W], what the convolution read, or what the BN did; its values matter to the BN.
        padding: left, right, top, bottom.
        norm: of the BN, with SiLU, between x and the convolution, or None.
        residual: like x, added to the result, not to the sums.

    Returns:
        The gradient, NHWC without gaps; with a BN the sums [2,C] of f and f * zh in fp32, f rounded
        as stored.
    """
    dz = nhwc(dz)
    grad_x = empty_nhwc(dz, x.shape)
    n, channels, height, width = x.shape
    pixels, kernel = n * height * width, weight.shape[-1]
    config = tuning.config("dwconv_bwd_data", x, c=channels, m=pixels, kernel=kernel, stride=stride)
    runs = triton.cdiv(pixels, config["RUN"])
    fused = norm is not None
    partial = empty_fp32(x, 1, runs, 2 * channels) if fused else None
    vec, channel_units = units(channels)
    act, bounds = activation_constants(activation)
    launch(
        dwconv_bwd_data_kernel, (runs, triton.cdiv(channels, config["BC"])), x.device,
        (dz, taps(weight), grad_x, nhwc(x) if fused else None, norm,
         None if residual is None else nhwc(residual), partial, *bounds, pixels, height, width,
         *dz.shape[2:], channel_units, padding[0], padding[2]),
        config, VEC=vec, K=kernel, STRIDE=stride, ACT=act,
    )  # fmt: skip
    return grad_x, None if partial is None else fold_sums(partial).view(2, channels)


def launch_dwconv_bwd_weight(
    dz: Tensor,
    x: Tensor,
    kernel: int,
    stride: int,
    padding: Sequence[int],
    *,
    norm: Tensor | None = None,
    activation: str = "identity",
) -> Tensor:
    """grad_weight [C,1,K,K] in fp32; the arguments as of `launch_dwconv_bwd_data`."""
    dz = nhwc(dz)
    n, channels, height, width = x.shape
    out_height, out_width = dz.shape[2:]
    pixels = n * out_height * width
    config = tuning.config("dwconv_bwd_weight", x, c=channels, kernel=kernel, stride=stride)
    blocks = triton.cdiv(channels, config["BC"])
    runs = max(1, min(PROGRAMS // (blocks * kernel), triton.cdiv(pixels, 4 * config["BP"])))
    run = triton.cdiv(triton.cdiv(pixels, runs), config["BP"]) * config["BP"]
    runs = max(1, triton.cdiv(pixels, run)) if run else 1
    partial = empty_fp32(x, 1, runs, kernel * kernel * channels)
    vec, channel_units, *strides = units(channels, *pixel_strides(x))
    act, bounds = activation_constants(activation)
    launch(
        dwconv_bwd_weight_kernel, (runs, blocks, kernel), x.device,
        (dz, x, partial, norm, *bounds, *strides, pixels, run,
         height, width, out_height, out_width, channel_units, padding[0], padding[2]),
        config, VEC=vec, K=kernel, STRIDE=stride, ACT=act,
    )  # fmt: skip
    by_tap = fold_sums(partial).view(kernel * kernel, channels)
    return by_tap.t().contiguous().view(channels, 1, kernel, kernel)
