"""Folds of the partial results of tiles, in a fixed order.

Computes: sums; Chan's merge of (count, mean, M2); sums per image of tiles that cross images
Shapes:   partial [B,P,L] -> [B,L]; [P,4,C] -> mean, var [C] and norm [5,C]; [P,S,F,C] -> [F,N,C]
Dtypes:   fp32, added up in fp64: an error of a sum over all pixels is the same in each of them, and
          gradients that are differences of such sums magnify it
Tiling:   a program owns a block of columns and a run of parts; more parts than one run take two
          launches
Bytes:    the partials once (the statistics twice, from cache)
FLOPs:    1 per partial; 8 for statistics
Source:   Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance"
Truth:    effnet_fast/reference/dwconv_bn_silu.py
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import load_vector, reciprocal_std
from .launching import dense, empty_fp32, launch

ONE_RUN = 512  # parts that one program folds; beyond, RUN parts each and a second launch
RUN = 128
_CONFIG = {"BP": 32, "BC": 32, "num_warps": 4, "num_stages": 1}


@triton.jit(do_not_specialize=["parts", "run", "columns", "factor"])
def fold_sums_kernel(partial, out, parts, run, columns, factor, BP: tl.constexpr, BC: tl.constexpr):
    """out [B,G,L] = factor * sums of runs of partial [B,P,L]."""
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = column < columns
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = group * run
    end = tl.minimum(start + run, parts)
    acc = tl.zeros([BP, BC], tl.float64)
    for first in range(start, end, BP):
        part = first + tl.arange(0, BP)
        at = (batch * parts + part)[:, None] * columns + column[None, :]
        inside = (part < end)[:, None] & mask[None, :]
        acc += tl.load(partial + at, mask=inside, other=0.0).to(tl.float64)
    at = (batch * tl.num_programs(1) + group) * columns + column
    tl.store(out + at, (tl.sum(acc, 0) * factor).to(tl.float32), mask=mask)


@triton.jit
def store_norm(norm, weight, bias, mean, var, eps, channels, c, mask):
    """Writes norm [5,C]: scale, shift, mean, rstd, var."""
    rstd = reciprocal_std(var, eps)
    scale = rstd * load_vector(weight, c, mask, 1.0)
    tl.store(norm + c, scale, mask=mask)
    tl.store(norm + channels + c, load_vector(bias, c, mask, 0.0) - mean * scale, mask=mask)
    tl.store(norm + 2 * channels + c, mean, mask=mask)
    tl.store(norm + 3 * channels + c, rstd, mask=mask)
    tl.store(norm + 4 * channels + c, var, mask=mask)


@triton.jit(do_not_specialize=["eps", "channels"])
def norm_kernel(norm, weight, bias, mean, var, eps, channels, BC: tl.constexpr):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = c < channels
    given = load_vector(mean, c, mask, 0.0)
    store_norm(norm, weight, bias, given, load_vector(var, c, mask, 0.0), eps, channels, c, mask)


@triton.jit(do_not_specialize=["parts", "run", "channels", "eps"])
def fold_statistics_kernel(
    partial, out, mean_out, var_out, norm, weight, bias, eps, parts, run, channels,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """(count, mean, M2, rest) of runs of partial [P,4,C] to out [G,4,C], or all to the others."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = c < channels
    group = tl.program_id(1)
    start = group * run
    end = tl.minimum(start + run, parts)
    near = tl.load(partial + (start.to(tl.int64) * 4 + 1) * channels + c, mask=mask, other=0.0)
    count = tl.zeros([BP, BC], tl.float32)
    shifted = tl.zeros([BP, BC], tl.float32)
    for first in range(start, end, BP):
        part = first + tl.arange(0, BP)
        at = (part * 4).to(tl.int64)[:, None] * channels + c[None, :]
        inside = (part < end)[:, None] & mask[None, :]
        n = tl.load(partial + at, mask=inside, other=0.0)
        mean = tl.load(partial + at + channels, mask=inside, other=0.0)
        rest = tl.load(partial + at + 3 * channels, mask=inside, other=0.0)
        count += n
        shifted += tl.where(n > 0, n * ((mean - near[None, :]) + rest), 0.0)
    total = tl.sum(count, 0)
    shift = tl.sum(shifted, 0) / tl.maximum(total, 1.0)
    merged = near + shift
    squares = tl.zeros([BP, BC], tl.float32)
    for first in range(start, end, BP):
        part = first + tl.arange(0, BP)
        at = (part * 4).to(tl.int64)[:, None] * channels + c[None, :]
        inside = (part < end)[:, None] & mask[None, :]
        n = tl.load(partial + at, mask=inside, other=0.0)
        deviation = tl.load(partial + at + channels, mask=inside, other=0.0) - near[None, :]
        deviation += tl.load(partial + at + 3 * channels, mask=inside, other=0.0) - shift[None, :]
        inner = tl.load(partial + at + 2 * channels, mask=inside, other=0.0)
        squares += tl.where(n > 0, inner + n * deviation * deviation, 0.0)
    var = tl.sum(squares, 0) / tl.maximum(total, 1.0)
    if norm is not None:
        store_norm(norm, weight, bias, merged, var, eps, channels, c, mask)
    if mean_out is not None:
        tl.store(mean_out + c, merged, mask=mask)
        tl.store(var_out + c, var, mask=mask)
    if out is not None:
        at = (group * 4).to(tl.int64) * channels + c
        tl.store(out + at, total, mask=mask)
        tl.store(out + at + channels, merged, mask=mask)
        tl.store(out + at + 2 * channels, tl.sum(squares, 0), mask=mask)
        tl.store(out + at + 3 * channels, shift - (merged - near), mask=mask)


@triton.jit(do_not_specialize=["images", "pixels", "segments", "channels"])
def fold_segments_kernel(
    partial, out, images, pixels, segments, channels, FIELDS: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """out [F,N,C] from partial [tiles,S,F,C] of tiles of BM rows, N images of `pixels` rows."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = c < channels
    n = tl.program_id(1).to(tl.int64)
    for field in tl.static_range(FIELDS):
        acc = tl.zeros([BC], tl.float64)
        for tile in range(n * pixels // BM, ((n + 1) * pixels - 1) // BM + 1):
            segment = n - tile * BM // pixels
            at = ((tile * segments + segment) * FIELDS + field) * channels
            acc += tl.load(partial + at + c, mask=mask, other=0.0).to(tl.float64)
        tl.store(out + (field * images + n) * channels + c, acc.to(tl.float32), mask=mask)


def _runs(parts: int) -> tuple[int, int]:
    """Parts per program, and programs."""
    run = parts if parts <= ONE_RUN else RUN
    return run, triton.cdiv(parts, run)


def fold_sums(partial: Tensor, factor: float = 1.0) -> Tensor:
    """factor * the sums over the middle dimension of partial [B,P,L], fp32: [B,L]."""
    batch, parts, columns = partial.shape
    if parts == 0:
        return partial.new_zeros(batch, columns)
    run, groups = _runs(parts)
    last = groups == 1
    out = empty_fp32(partial, batch, groups, columns)
    launch(
        fold_sums_kernel, (triton.cdiv(columns, _CONFIG["BC"]), groups, batch), partial.device,
        (partial, out, parts, run, columns, factor if last else 1.0), _CONFIG,
    )  # fmt: skip
    return out.view(batch, columns) if last else fold_sums(out, factor)


def _fold_statistics(
    partial: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    norm: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    parts, _, channels = partial.shape
    run, groups = _runs(parts)
    last = groups == 1
    out = None if last else empty_fp32(partial, groups, 4, channels)
    ends = (mean, var, norm) if last else (None,) * 3
    launch(
        fold_statistics_kernel, (triton.cdiv(channels, _CONFIG["BC"]), groups), partial.device,
        (partial, out, *ends, dense(weight), dense(bias), eps, parts, run, channels), _CONFIG,
    )  # fmt: skip
    if out is not None:
        _fold_statistics(out, mean, var, norm, weight, bias, eps)


def fold_statistics(partial: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, biased variance [C] of partial [P,4,C]: count, mean, M2, what the mean was rounded by.

    Zeros where there is no part.
    """
    parts, _, channels = partial.shape
    if parts == 0:
        return partial.new_zeros(channels), partial.new_zeros(channels)
    mean, var = empty_fp32(partial, channels), empty_fp32(partial, channels)
    _fold_statistics(partial, mean, var, None)
    return mean, var


def fold_norm(partial: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """norm [5,C] as of `launch_norm`, by the statistics partial [P,4,C]."""
    parts, _, channels = partial.shape
    if parts == 0:
        zeros = partial.new_zeros(channels)
        return launch_norm(weight, bias, zeros, zeros, eps)
    norm = empty_fp32(partial, 5, channels)
    _fold_statistics(partial, None, None, norm, weight, bias, eps)
    return norm


def launch_norm(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """norm [5,C] of a BatchNorm, fp32: scale, shift, mean, rstd, var."""
    channels = mean.shape[0]
    norm = empty_fp32(mean, 5, channels)
    launch(
        norm_kernel, (triton.cdiv(channels, 128),), mean.device,
        (norm, dense(weight), dense(bias), dense(mean), dense(var), eps, channels),
        {"BC": 128, "num_warps": 4, "num_stages": 1},
    )  # fmt: skip
    return norm


def fold_segments(partial: Tensor, images: int, pixels: int, tile_rows: int) -> Tensor:
    """Sums per image, fp32 [F,N,C], of partial [tiles,S,F,C].

    Args:
        images, pixels: N, and the rows of each.
        tile_rows: rows of a tile; its segment s belongs to image tile * tile_rows // pixels + s.
    """
    _, segments, fields, channels = partial.shape
    out = torch.empty((fields, images, channels), dtype=torch.float32, device=partial.device)
    config = {"BC": 128, "num_warps": 4, "num_stages": 1}
    launch(
        fold_segments_kernel, (triton.cdiv(channels, 128), images), partial.device,
        (partial, out, images, pixels, segments, channels), config, FIELDS=fields, BM=tile_rows,
    )  # fmt: skip
    return out


def segments_of(pixels: int, tile_rows: int) -> int:
    """The images, at most, that a tile of rows touches."""
    return (tile_rows - 2) // pixels + 2 if tile_rows > 1 else 1
