"""The layout of images [N,C,H,W] as PyTorch sees it, and conversions whose gradients turn back.

In a convolution of PyTorch the result is channels_last if the images or the weight are, and the
layers behind it keep that; other layouts give contiguous results. A squeeze-excite gives its
input's layout whatever its weights are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from effnet_fast.backends import in_transform

NHWC, NCHW = torch.channels_last, torch.contiguous_format


def is_nhwc(x: Tensor) -> bool:
    """Whether PyTorch takes x [N,C,H,W] for channels_last.

    The strides decide, those of dimensions of size 1 too.

    Source: torch/headeronly/core/MemoryFormat.h, `is_channels_last_strides_2d`.
    """
    _, c, h, w = x.shape
    sn, sc, sh, sw = x.stride()
    if sw < sc * c or sh < sw * w or sn < sh * h:
        return False
    return sc > 0 and sh * h != sc and x.numel() > 0


def makes_nhwc(weights: Iterable[Tensor]) -> bool:
    """Whether convolutions in a row give a channels_last result for images that are not.

    Args:
        weights: [Cout,Cin/groups,K,K] of each, without those of squeeze-excites.
    """
    return any(map(is_nhwc, weights))


def is_batched(grad: Tensor) -> bool:
    """Whether a gradient is of a batch (is_grads_batched, vmap), which has no memory format."""
    if in_transform():
        return True
    # torch.compile cannot follow the question, and traces no such batch.
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad)


class _Convert(torch.autograd.Function):
    """x in one memory format, its gradient in the other; differentiable again and again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to: torch.memory_format) -> Tensor:
        ctx.to = to
        return x.clone(memory_format=to)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if is_batched(grad):
            return grad, None
        if ctx.to is NCHW:
            return to_nhwc(grad), None
        is_done = grad.is_contiguous() and not is_nhwc(grad)
        return (grad if is_done else _convert(grad, NCHW)), None


def _convert(x: Tensor, to: torch.memory_format) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return _Convert.apply(x, to)
    return x.clone(memory_format=to)


def to_nhwc(x: Tensor) -> Tensor:
    """x [N,C,H,W] in channels_last; itself where it is."""
    return x if is_nhwc(x) else _convert(x, NHWC)


def to_nchw(x: Tensor) -> Tensor:
    """x [N,C,H,W] without gaps in the order of its dimensions; itself if not channels_last."""
    return _convert(x, NCHW) if is_nhwc(x) else x
