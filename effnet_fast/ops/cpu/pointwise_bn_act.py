"""1x1 convolution, BatchNorm, activation, gate and residual on the CPU.

The product is torch's own, so that its last bits may depend on the number of threads. In eval the
gate and BN's scale ride on the weight where that is smaller than the image, and BN, activation and
residual are one in-place pass over the product. Nothing is kept between calls, so an edited weight
cannot go stale (docs/decisions/inference.md compares it with a cached folded weight).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_fast.backends import native
from effnet_fast.ops.pointwise_bn_act import empty_eval
from effnet_fast.ops.registration import BF16, empty_nhwc, isa_of, native_vectors, nhwc
from effnet_fast.reference.activations import kernel_activation

TILE_CHANNELS = 32  # bf16 values in a row of a tile


def _rows(x: Tensor) -> Tensor:
    """x [N,C,H,W] in NHWC order as a matrix [N,H*W,C]."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, h * w, c)


def _matrix(x: Tensor) -> Tensor:
    """x [N,C,H,W], NHWC without gaps, as [N * H * W, C]."""
    n, c, h, w = x.shape
    return x.as_strided((n * h * w, c), (c, 1))


def _gated(x: Tensor, gate: Tensor, backend: str) -> Tensor:
    """x * gate in NHWC order, x [N,C,H,W] and gate [N,C,1,1]."""
    n, channels, h, w = x.shape
    scaled = empty_nhwc(x, x.shape)
    factors = gate.reshape(n, channels).float().contiguous()
    native.load().gate(
        isa_of(backend), n, channels, h * w, x.dtype is BF16, x.data_ptr(),
        factors.data_ptr(), 0, scaled.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return scaled


def _spreads(x: Tensor) -> bool:
    """Whether torch's product would carry a NaN or Inf of x [N,C,H,W] into the pixel before it.

    On the tile unit, oneDNN reads a pixel's bf16 channels in steps of TILE_CHANNELS: what follows
    the last step's channels is the next pixel, times zero.
    """
    tail = x.shape[1] % TILE_CHANNELS
    return x.dtype is BF16 and tail != 0 and not bool(x.sum().isfinite())


def _product(x: Tensor, weight: Tensor, gate: Tensor | None, y: Tensor, backend: str) -> None:
    """Writes conv(x * gate) to y [N,Cout,H,W]; x and y in NHWC order."""
    n, in_channels, h, w = x.shape
    spreads, small_weight = _spreads(x), weight.shape[0] <= h * w  # smaller than the image
    if gate is not None and (spreads or not small_weight):
        x, gate = _gated(x, gate, backend), None
    if spreads:
        y.copy_(F.conv2d(x, weight.to(x.dtype)))
    elif gate is None:
        matrix = weight if weight.dtype is x.dtype else weight.to(x.dtype)
        matrix = matrix.reshape(-1, in_channels)
        torch.mm(_matrix(x), matrix.t(), out=_matrix(y))
    elif n == 1:
        gated = (weight.reshape(-1, in_channels) * gate.reshape(1, in_channels)).to(x.dtype)
        torch.mm(_matrix(x), gated.t(), out=_matrix(y))
    else:
        gated = weight.reshape(1, -1, in_channels) * gate.reshape(n, 1, in_channels)
        torch.bmm(_rows(x), gated.to(x.dtype).transpose(1, 2), out=_rows(y))


def compute(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bn: Sequence[Tensor | None],
    gate: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    backend: str,
) -> Tensor:
    """Writes y [N,Cout,H,W], NHWC without gaps, and returns it; bn is weight, bias, mean, var."""
    if y.numel() == 0:
        return y
    _product(nhwc(x), weight, gate, y, backend)
    added = None if residual is None else nhwc(residual.to(x.dtype))
    _kept, vectors = native_vectors(bn)
    native.load().bn_act(
        isa_of(backend), y.numel() // y.shape[1], y.shape[1], y.dtype is BF16,
        y.data_ptr(), vectors, eps, 0 if added is None else added.data_ptr(), y.data_ptr(),
        kernel_activation(activation), torch.get_num_threads(),
    )  # fmt: skip
    return y


def pointwise_bn_act_eval(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """The registered op."""
    return compute(empty_eval(x, weight, *rest), x, weight, rest[:4], *rest[4:])
