"""Depthwise convolution with BatchNorm and an activation, forward.

Computes: z = conv_dw(in(x), weight) with in(x) = x or act(bn(x)), padding being 0 after it;
          y = z and its (count, mean, M2) by tile, or y = act(bn(z)) and its sums by tile; act is
          SiLU or clamp(lo, hi)
Shapes:   x [N,C,H,W], weight [C,1,K,K], y [N,C,Ho,Wo]
Dtypes:   x/y fp32|fp16|bf16, weight x's or fp32, vectors any; accumulation fp32
Layout:   channels_last, any strides over N, H, W
Tiling:   a program owns R rows and BW columns of one image's y and BC channels. It goes down the
          rows of x that these need and adds each loaded value to every row of y that it reaches:
          in(x) is formed K * ((R-1)*stride + K) / R times per column of y, not K * K times
Bytes:    x and y once; the K columns of a tap come from L1
FLOPs:    2 * K * K per output; with SiLU on load two special-function results per value formed
Source:   original
Truth:    effnet_fast/reference/dwconv_bn_silu.py
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .bn_act import launch_bn_act_bwd, launch_bn_act_fwd, launch_bn_sums
from .dwconv_backward import launch_dwconv_bwd_data, launch_dwconv_bwd_weight, taps
from .elementwise import activated, load_affine, load_norm, store_statistics
from .folds import fold_statistics, fold_sums, launch_norm
from .launching import (
    NO_BN,
    BatchNorm,
    activation_constants,
    dense,
    empty_fp32,
    empty_nhwc,
    launch,
    pixel_strides,
    units,
)

Sides = Sequence[int]  # left, right, top, bottom


@triton.jit
def rows_statistics(stored, total, count, oh, ow, height, width, c_inside, R: tl.constexpr):
    """As `tile_statistics`, of R rows [BW,C] from row oh on, with their sum `total` [C]."""
    mean = total / tl.maximum(count, 1.0)
    squares = tl.zeros(total.shape, tl.float32)
    rest = tl.zeros(total.shape, tl.float32)
    for r in tl.static_range(R):
        inside = (ow < tl.where(oh + r < height, width, 0))[:, None] & c_inside[None, :]
        deviation = tl.where(inside, stored[r] - mean[None, :], 0.0)
        squares += tl.sum(deviation * deviation, 0)
        rest += tl.sum(deviation, 0)
    rest = rest / tl.maximum(count, 1.0)
    return mean, squares - count * rest * rest, rest


@triton.jit(do_not_specialize=[
    "eps", "stride_n", "stride_h", "stride_w", "height", "width", "out_height",
    "out_width", "channel_units", "left", "top", "strips", "columns",
])  # fmt: skip
def dwconv_fwd_kernel(
    x, weight, y, in_norm, bn_weight, bn_bias, mean, var, eps, partial, sums, lo, hi,
    stride_n, stride_h, stride_w, height, width, out_height, out_width, channel_units, left, top,
    strips, columns,
    VEC: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, ACT: tl.constexpr,
    R: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """weight [K*K,C] fp32; partial [tiles,4,C] and sums [tiles,C] where given, tiles by image.

    stride_n, stride_h and stride_w are in units of VEC values.
    """
    channels = channel_units * VEC
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    c_inside = c < channels
    tile = tl.program_id(0)
    ow = (tile % columns) * BW + tl.arange(0, BW)
    oh = (tile // columns % strips) * R
    n = (tile // columns // strips).to(tl.int64)
    if in_norm is not None:
        in_scale, in_shift, _, _ = load_norm(in_norm, channels, c, c_inside)
    factors = ()
    for tap in tl.static_range(K * K):
        factor = tl.load(weight + tap * channels + c, mask=c_inside, other=0.0)
        factors = factors + (factor[None, :],)
    accs = (tl.zeros([BW, BC], tl.float32),) * R
    for i in tl.static_range((R - 1) * STRIDE + K):
        ih = oh * STRIDE - top + i
        row = x + (n * stride_n + ih.to(tl.int64) * stride_h) * VEC
        row_width = tl.where((ih >= 0) & (ih < height), width, 0)
        values = ()
        for kw in tl.static_range(K):
            iw = ow * STRIDE - left + kw
            inside = ((iw >= 0) & (iw < row_width))[:, None] & c_inside[None, :]
            at = iw.to(tl.int64)[:, None] * stride_w * VEC + c[None, :]
            value = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
            if in_norm is not None:
                value = value * in_scale[None, :] + in_shift[None, :]
                value = tl.where(inside, activated(value, lo, hi, ACT), 0.0)
            values = values + (value,)
        reached = ()
        for r in tl.static_range(R):
            acc = accs[r]
            if i - r * STRIDE >= 0 and i - r * STRIDE < K:
                # A row of taps is summed by itself: long chains lose digits.
                part = values[0] * factors[(i - r * STRIDE) * K]
                for kw in tl.static_range(1, K):
                    part += values[kw] * factors[(i - r * STRIDE) * K + kw]
                acc += part
            reached = reached + (acc,)
        accs = reached
    if mean is not None:
        centre, scale, shift = load_affine(bn_weight, bn_bias, mean, var, eps, c, c_inside)
    total = tl.zeros([BC], tl.float32)
    stored = ()
    for r in tl.static_range(R):
        acc = accs[r]
        inside = (ow < tl.where(oh + r < out_height, out_width, 0))[:, None] & c_inside[None, :]
        if mean is not None:
            acc = (acc - centre[None, :]) * scale[None, :] + shift[None, :]
            acc = activated(acc, lo, hi, ACT)
        rounded = acc.to(y.dtype.element_ty)
        out_row = y + ((n * out_height + oh + r) * out_width) * channels
        tl.store(out_row + ow[:, None] * channels + c[None, :], rounded, mask=inside)
        kept = tl.where(inside, rounded.to(tl.float32), 0.0)
        stored = stored + (kept,)
        if partial is not None or sums is not None:
            total += tl.sum(kept, 0)
    if sums is not None:
        tl.store(sums + tile.to(tl.int64) * channels + c, total, mask=c_inside)
    if partial is not None:
        own_columns = tl.minimum(out_width - (tile % columns) * BW, BW)
        count = (tl.minimum(out_height - oh, R) * own_columns).to(tl.float32)
        tile_mean, squares, rest = rows_statistics(
            stored, total, count, oh, ow, out_height, out_width, c_inside, R
        )
        store_statistics(partial, tile, count, tile_mean, squares, rest, channels, c, c_inside)


def out_size(x: Tensor, kernel: int, stride: int, padding: Sides) -> tuple[int, int]:
    """Ho and Wo."""
    left, right, top, bottom = padding
    height, width = x.shape[2] + top + bottom, x.shape[3] + left + right
    return (height - kernel) // stride + 1, (width - kernel) // stride + 1


def launch_dwconv_fwd(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: Sides,
    *,
    in_norm: Tensor | None = None,
    bn: BatchNorm = NO_BN,
    eps: float = 0.0,
    activation: str = "identity",
    statistics: bool = False,
    pool: bool = False,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [N,C,Ho,Wo] as the file's head says.

    Args:
        in_norm: of the BN, with the activation, applied to x as it is loaded, or None.
        bn, eps: BN and activation applied to the convolution, where the mean is given.
        packed: what `taps` makes of the weight, None to have it made.

    Returns:
        y; partial statistics [tiles,4,C] if asked for; the mean of y over H and W [N,C] if asked
        for, fp32.
    """
    n, channels, height, width = x.shape
    kernel = weight.shape[-1]
    out_height, out_width = out_size(x, kernel, stride, padding)
    y = empty_nhwc(x, (n, channels, out_height, out_width))
    config = tuning.config(
        "dwconv_fwd", x, c=channels, h=out_height, w=out_width, kernel=kernel, stride=stride
    )
    strips, columns = triton.cdiv(out_height, config["R"]), triton.cdiv(out_width, config["BW"])
    tiles = n * strips * columns
    partial = empty_fp32(x, tiles, 4, channels) if statistics else None
    sums = empty_fp32(x, n, strips * columns, channels) if pool else None
    vec, channel_units, *strides = units(channels, *pixel_strides(x))
    act, bounds = activation_constants(activation)
    launch(
        dwconv_fwd_kernel, (tiles, triton.cdiv(channels, config["BC"])), x.device,
        (x, taps(weight) if packed is None else packed, y, in_norm, *map(dense, bn), eps,
         partial, sums, *bounds,
         *strides, height, width, out_height, out_width, channel_units, padding[0], padding[2],
         strips, columns),
        config, VEC=vec, K=kernel, STRIDE=stride, ACT=act,
    )  # fmt: skip
    pooled = None if sums is None else fold_sums(sums, 1.0 / max(1, out_height * out_width))
    return y, partial, pooled


def dwconv_bn_silu_eval(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    stride: int,
    padding: Sides,
    eps: float,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The op of this name."""
    bn = (bn_weight, bn_bias, mean, var)
    y, _, pooled = launch_dwconv_fwd(
        x, weight, stride, padding, bn=bn, eps=eps, activation=activation, pool=True
    )
    assert pooled is not None
    return y, pooled


def dwconv_statistics(
    x: Tensor, weight: Tensor, stride: int, padding: Sides, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The op of this name."""
    z, partial, _ = launch_dwconv_fwd(x, weight, stride, padding, statistics=True)
    assert partial is not None
    if z.numel() == 0:
        return z, partial.new_zeros(x.shape[1]), partial.new_zeros(x.shape[1])
    return z, *fold_statistics(partial)


def bn_silu(
    z: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    backend: str,
) -> Tensor:
    """The op of this name."""
    return launch_bn_act_fwd(z, launch_norm(bn_weight, bn_bias, mean, var, eps), activation)


def dwconv_bn_silu_backward(
    grad_y: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    stride: int,
    padding: Sides,
    eps: float,
    training: bool,
    wanted: Sequence[bool],
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op of this name."""
    norm = launch_norm(bn_weight, bn_bias, mean, var, eps)
    want_x, want_weight, want_sums = wanted
    none = x.new_empty(0)
    sums, grad_x, grad_weight = none, none.clone(), none.clone()
    if want_sums or (training and (want_x or want_weight)):
        sums = launch_bn_sums(grad_y, z, norm, activation)
    if want_x or want_weight:
        totals = sums if training else None
        dz = launch_bn_act_bwd(grad_y, z, norm, activation, totals)
        if want_x:
            grad_x, _ = launch_dwconv_bwd_data(dz, weight, x, stride, padding)
        if want_weight:
            grad_weight = launch_dwconv_bwd_weight(dz, x, weight.shape[-1], stride, padding)
    return grad_x, grad_weight, sums if want_sums else none.clone()
