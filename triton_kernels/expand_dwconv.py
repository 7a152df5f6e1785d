"""Expansion and depthwise convolution of an MBConv in one, for inference: no expanded tensor.

Computes: e = act(bn(x weight^T)), 0 in the padding; y = act(bn(conv_dw(e, taps))), and the sums
          of y by tile; act is SiLU or clamp(lo, hi) with act(0) = 0
Shapes:   x [N,Cin,H,W], weight [C,Cin], taps [C,1,K,K], y [N,C,Ho,Wo]
Dtypes:   x/y fp16|bf16, and in the interpreter fp32, for which registers do not suffice; weight
          x's or fp32, vectors any; e rounded as if it were stored; accumulation fp32
Layout:   channels_last without gaps
Tiling:   a program owns BC channels and a strip of one image's y, `run` rows high and OUT columns
          wide. It goes down the rows of x: P pixels of one row are expanded as [BC,P] and stay in
          registers, and each of the K shifts along the row is a product with a matrix of zeros and
          ones, which copies 16-bit values exactly and takes its operand from registers. So e is
          formed (run + K - S) / run * P / (OUT * S) times and never K times. A NaN or an infinity
          spreads over the tile's row, as the gate then spreads it over the image: the kernel is
          for blocks with such a gate alone
Bytes:    x once per channel tile (from L2 after the first), y once
FLOPs:    2 * (Cin + P / S * K) per value of e formed, 2 * K * K per output
Source:   original
Truth:    effnet_fast/reference/mbconv.py
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import expand_choice
from .dwconv_backward import taps as taps_of
from .dwconv_bn_silu import out_size
from .elementwise import clamp, load_affine
from .folds import fold_sums
from .launching import (
    INTERPRETS,
    activation_constants,
    dense,
    dot_precision,
    empty_fp32,
    empty_nhwc,
    launch,
    nhwc,
    units,
)

Layer = Sequence[Tensor]  # weight, bn_weight, bn_bias, mean, var; some None


@triton.jit
def quick_silu(u):
    """silu(u) by two special functions and four other instructions.

    To 8e-7 of it for |u| < 10, and to 4e-6 where u nears -88, as u * log2(e) is rounded.
    """
    root = tl.rsqrt(1.0 + tl.exp2(u * -1.4426950408889634))  # log2(e)
    return u * root * root


@triton.jit
def quickly_activated(u, lo, hi, ACT: tl.constexpr):
    """As `elementwise.activated`."""
    if ACT == "silu":
        return quick_silu(u)
    else:
        return clamp(u, lo, hi)


@triton.jit
def folded_affine(weight, bias, mean, var, eps, c, mask):
    """scale and shift of BN: u = z * scale + shift."""
    centre, scale, shift = load_affine(weight, bias, mean, var, eps, c, mask)
    return scale, shift - centre * scale


@triton.jit(do_not_specialize=[
    "in_eps", "eps", "height", "width", "out_height",
    "out_width", "in_units", "out_units", "left", "top", "strips", "columns", "run",
])  # fmt: skip
def expand_dwconv_fwd_kernel(
    x, weight, in_weight, in_bias, in_mean, in_var, in_eps,
    taps, bn_weight, bn_bias, mean, var, eps, y, sums, lo, hi,
    height, width, out_height, out_width, in_units, out_units,
    left, top, strips, columns, run,
    VEC: tl.constexpr, PRECISION: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr,
    ACT: tl.constexpr, P: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """taps [K*K,C] fp32; sums [tiles,C], tiles by image."""
    BW: tl.constexpr = P // STRIDE
    OUT: tl.constexpr = (P - K) // STRIDE + 1
    OPEN: tl.constexpr = (K + STRIDE - 1) // STRIDE  # rows of y that a row of x reaches
    in_channels, channels = in_units * VEC, out_units * VEC
    c_tiles = tl.cdiv(channels, BC)
    c = (tl.program_id(0) % c_tiles) * BC + tl.arange(0, BC)
    c_inside = c < channels
    tile = tl.program_id(0) // c_tiles
    first_column = (tile % columns) * OUT
    first = (tile // columns % strips) * run
    n = (tile // columns // strips).to(tl.int64)
    k = tl.arange(0, BK)
    matrix = tl.load(
        weight + c[:, None] * in_channels + k[None, :],
        mask=c_inside[:, None] & (k < in_channels)[None, :], other=0.0,
    ).to(x.dtype.element_ty)  # fmt: skip
    in_scale, in_shift = folded_affine(in_weight, in_bias, in_mean, in_var, in_eps, c, c_inside)
    scale, shift = folded_affine(bn_weight, bn_bias, mean, var, eps, c, c_inside)
    p = tl.arange(0, P)
    iw = first_column * STRIDE - left + p
    column_inside = (iw >= 0) & (iw < width)
    at = iw[:, None] * in_channels + k[None, :]
    out = tl.arange(0, BW)
    ow = first_column + out
    rows = tl.minimum(run, out_height - first)
    own_width = tl.minimum(first_column + OUT, out_width)
    accs = (tl.zeros([BC, BW], tl.float32),) * OPEN
    total = tl.zeros([BC], tl.float32)
    for t in range(rows + OPEN - 1):
        for a in tl.static_range(STRIDE):
            ih = (first + t) * STRIDE + a - top
            row_inside = (ih >= 0) & (ih < height)
            inside = (iw >= 0) & (iw < tl.where(row_inside, width, 0))
            pixels = tl.load(
                x + (n * height + ih) * width * in_channels + at,
                mask=inside[:, None] & (k < in_channels)[None, :], other=0.0,
            )  # fmt: skip
            z = tl.dot(matrix, tl.trans(pixels), input_precision=PRECISION)
            # Of a row outside, z is 0 and so is e; of a column outside, no product takes e.
            u = z * in_scale[:, None] + tl.where(row_inside, in_shift, 0.0)[:, None]
            e = quickly_activated(u, lo, hi, ACT).to(x.dtype.element_ty)
            for kw in tl.static_range(K):
                select = (p[:, None] == out[None, :] * STRIDE + kw) & column_inside[:, None]
                value = tl.dot(e, select.to(x.dtype.element_ty), input_precision="ieee")
                reached = ()
                for j in tl.static_range(OPEN):
                    acc = accs[j]
                    if a + j * STRIDE < K:
                        tap = taps + ((a + j * STRIDE) * K + kw) * channels + c
                        acc += value * tl.load(tap, mask=c_inside, other=0.0)[:, None]
                    reached = reached + (acc,)
                accs = reached
        oh = first + t - (OPEN - 1)
        u = accs[OPEN - 1] * scale[:, None] + shift[:, None]
        value = quickly_activated(u, lo, hi, ACT)
        kept = ow < tl.where(oh >= first, own_width, 0)
        total += tl.sum(tl.where(kept[None, :], value, 0.0), 1)
        y_row = y + ((n * out_height + oh) * out_width) * channels
        tl.store(
            y_row + ow[:, None] * channels + c[None, :], tl.trans(value.to(y.dtype.element_ty)),
            mask=kept[:, None] & c_inside[None, :],
        )  # fmt: skip
        moved = (tl.zeros([BC, BW], tl.float32),)
        for j in tl.static_range(OPEN - 1):
            moved = moved + (accs[j],)
        accs = moved
    tl.store(sums + tile.to(tl.int64) * channels + c, total, mask=c_inside)


def shape_of(
    x: Tensor, channels: int, kernel: int, stride: int, padding: Sequence[int]
) -> expand_choice.Shape:
    """What the model of the choice needs of a call."""
    n, in_channels, height, width = x.shape
    sizes = (height, width, *out_size(x, kernel, stride, padding))
    return expand_choice.Shape(n, in_channels, channels, *sizes, kernel, stride, x.element_size())


def launch_expand_dwconv_fwd(
    x: Tensor,
    expand: Layer,
    depthwise: Layer,
    stride: int,
    padding: Sequence[int],
    eps: Sequence[float],
    activation: str,
    *,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y [N,C,Ho,Wo] as the file's head says, and its mean over H and W [N,C] in fp32.

    Args:
        padding: left, right, top, bottom.
        eps: of the two BatchNorms.
        activation: after both.
        packed: `taps` of the depthwise weight where they are there already.

    Raises:
        ValueError: more channels of x than the kernel takes, or fp32 on a GPU.
    """
    x = nhwc(x)
    weight, taps = expand[0], depthwise[0]
    shape = shape_of(x, weight.shape[0], taps.shape[-1], stride, padding)
    n, in_channels, channels, height, width, out_height, out_width, kernel, *_ = shape
    if in_channels > expand_choice.MAX_CHANNELS:
        raise ValueError(
            f"x has {in_channels} channels, allowed are up to {expand_choice.MAX_CHANNELS}"
        )
    if x.element_size() > 2 and not INTERPRETS:
        raise ValueError(f"x is {x.dtype}, allowed are torch.float16 and torch.bfloat16")
    config, tile = expand_choice.tile_of(x, shape)
    strips, columns, channel_tiles = expand_choice.grid(
        shape, tile, expand_choice.strip_rows(shape, tile)
    )
    y = empty_nhwc(x, (n, channels, out_height, out_width))
    sums = empty_fp32(x, n, strips * columns, channels)
    vec, in_units, out_units = units(in_channels, channels)
    act, bounds = activation_constants(activation)
    launch(
        expand_dwconv_fwd_kernel, (n * strips * columns * channel_tiles,), x.device,
        (x, weight.contiguous(), *map(dense, expand[1:]), eps[0],
         taps_of(taps) if packed is None else packed, *map(dense, depthwise[1:]), eps[1], y, sums,
         *bounds, height, width, out_height, out_width, in_units, out_units,
         padding[0], padding[2], strips, columns, triton.cdiv(out_height, max(1, strips))),
        config, VEC=vec, PRECISION=dot_precision(x.dtype), K=kernel, STRIDE=stride,
        ACT=act, BK=max(16, triton.next_power_of_2(in_channels)),
    )  # fmt: skip
    return y, fold_sums(sums, 1.0 / max(1, out_height * out_width))
