"""Per-channel sums over pixels, and the folding of partial sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effnet_fast.ops.cuda.launching import DTYPES, Bn, launchers, queue, scratch
from effnet_fast.ops.registration import address
from effnet_fast.reference.activations import kernel_activation

PIXELS = 256  # of a chunk, at most
SUM, PRODUCT, SQUEEZE, BN_ACT, BN = range(5)  # Reduction of csrc/cuda/args.h
SUMS = (1, 1, 3, 2, 2)


def chunks_of(pixels: int) -> int:
    """Chunks of an image's pixels, each with sums of its own."""
    return -(-pixels // PIXELS)


def partial_sums(
    backend: str,
    what: int,
    x: Tensor,
    grad_y: Tensor | None = None,
    bn: Bn | None = None,
    keep: Tensor | None = None,
    factor: float = 1.0,
    activation: str = "identity",
) -> Tensor:
    """Sums [N,chunks,SUMS[what],C] over chunks of x [N,C,H,W], NHWC without gaps.

    activation: that SQUEEZE and BN_ACT apply, here and below.
    """
    n, c, h, w = x.shape
    chunks, bn = chunks_of(h * w), bn or Bn(None)
    partial = scratch(x, n, chunks, SUMS[what], c)
    launchers(backend).reduce(
        queue(x), (n, c, h * w, chunks), DTYPES[x.dtype], what, x.data_ptr(), address(grad_y),
        bn.arguments, address(keep), factor, partial.data_ptr(), kernel_activation(activation),
    )  # fmt: skip
    return partial


def fold(
    backend: str,
    partial: Tensor,
    sizes: Sequence[int],
    out: Tensor,
    strides: Sequence[int],
    first_factor: float = 1.0,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """Sums of partial as [outer,parts,rows,C] over the parts, written to out by these strides.

    rows: the first and how many are folded, None for all; the first of them times first_factor.
    """
    launchers(backend).fold_sum(
        queue(partial), partial.data_ptr(), tuple(sizes), rows or (0, sizes[2]), tuple(strides),
        first_factor,
        out.data_ptr(),
    )  # fmt: skip
    return out


def channel_sums(
    backend: str,
    what: int,
    x: Tensor,
    grad_y: Tensor | None = None,
    bn: Bn | None = None,
    keep: Tensor | None = None,
    activation: str = "identity",
) -> Tensor:
    """Sums [SUMS[what],C] over all images of x [N,C,H,W], NHWC without gaps."""
    partial = partial_sums(backend, what, x, grad_y, bn, keep, activation=activation)
    n, chunks, sums, c = partial.shape
    out = scratch(x, sums, c)
    return fold(backend, partial, (1, n * chunks, sums, c), out, (0, c, 1))


def image_sums(
    backend: str,
    what: int,
    x: Tensor,
    grad_y: Tensor | None = None,
    bn: Bn | None = None,
    factor: float = 1.0,
    activation: str = "identity",
) -> Tensor:
    """Sums [SUMS[what],N,C] over each image of x, the first times factor."""
    n, c = x.shape[:2]
    sums = SUMS[what]
    if sums == 1 and chunks_of(x.shape[2] * x.shape[3]) == 1:
        return partial_sums(backend, what, x, grad_y, bn, factor=factor).view(1, n, c)
    partial = partial_sums(backend, what, x, grad_y, bn, activation=activation)
    out = scratch(x, sums, n, c)
    sizes = (n, partial.shape[1], sums, c)
    return fold(backend, partial, sizes, out, (c, n * c, 1), factor)


def moments(backend: str, partial: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of (count, pivot, mean, M2) [parts,4,C]."""
    parts, _, c = partial.shape
    mean = scratch(partial, c)
    var = torch.empty_like(mean)
    launchers(backend).merge_moments(
        queue(partial), partial.data_ptr(), parts, c, mean.data_ptr(), var.data_ptr()
    )
    return mean, var
