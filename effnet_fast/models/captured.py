"""Layouts where torch.compile, torch.export, FX or TorchScript captures the operators.

Elsewhere `in_turn` decides about them.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from effnet_fast.modules import observed
from effnet_fast.ops.layout import makes_nhwc


def to_channels_last(x: Tensor) -> Tensor:
    """Images [N,C,H,W] without gaps in channels_last; anything else as it is."""
    if x.dim() != 4 or not x.is_contiguous():
        return x
    if torch.jit.is_scripting():
        return x.contiguous(memory_format=torch.channels_last)
    if observed.in_transform():  # vmap has no channels_last
        return x
    return x.contiguous(memory_format=torch.channels_last)


def is_captured(x: Tensor) -> bool:
    """Whether torch.compile, torch.export, FX, or TorchScript records what becomes of x."""
    if torch.jit.is_scripting() or torch.compiler.is_compiling():
        return True
    return observed.is_traced() or not isinstance(x, Tensor)


def laid_out_as(y: Tensor, x: Tensor) -> Tensor:
    """A map y without gaps if `to_channels_last` converts the images x; else as it is."""
    if x.dim() != 4 or not x.is_contiguous():
        return y
    if x.is_contiguous(memory_format=torch.channels_last):
        return y
    return y.contiguous()


def weights_make_nhwc(weights: list[Tensor]) -> bool:
    """`makes_nhwc` where operators are captured: torch.jit.trace warns of what is no constant."""
    if not torch.jit.is_tracing():
        return makes_nhwc(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return makes_nhwc(weights)
