"""What is decided about a call of an op beside its tensors, once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effnet_fast.ops.exchange import Exchange
from effnet_fast.reference.arguments import Sides


class Norm(NamedTuple):
    """How a BatchNorm normalises."""

    training: bool  # by the batch's statistics instead of the running ones
    momentum: float  # share of the batch's statistics in the running ones
    eps: float  # added to the variance
    moves: bool = True  # whether the running statistics, where there are any, move in training
    exchange: Exchange | None = None  # where the batch is that of several processes: this call's


NO_NORM = Norm(False, 0.0, 0.0, False)  # of an expansion that is absent


class Call(NamedTuple):
    """How an op runs."""

    norms: tuple[Norm, ...]  # of the op's BatchNorms in order; of a block's absent expansion too
    needs_grad: bool  # whether a gradient of a tensor is wanted
    infers: bool  # whether none is, and no BatchNorm normalises by the batch
    backend: str  # that runs it, neither "auto" nor the reference
    stride: tuple[int, int]  # (height, width) of its spatial convolution
    padding: Sides  # (left, right, top, bottom) of its spatial convolution
    residual: bool  # whether a block adds its input
    memory: str  # "fast", or "lean" for a block that saves one expanded tensor less
    activation: str  # of the op; of a block's expansion and depthwise convolution
    se_activation: str  # of a block's squeeze-and-excite
    gate: str  # likewise


def call_of(
    norms: tuple[Norm, ...],
    tensors: tuple[Tensor | None, ...],
    backend: str,
    stride: tuple[int, int] = (1, 1),
    padding: Sides = (0, 0, 0, 0),
    residual: bool = False,
    memory: str = "fast",
    activation: str = "silu",
    se_activation: str = "silu",
    gate: str = "sigmoid",
) -> Call:
    """The call of an op on tensors: its input, and what a gradient may be wanted of."""
    needs_grad = wants_gradient(*tensors)
    infers = not needs_grad and not any(norm.training for norm in norms)
    return Call(
        norms, needs_grad, infers, backend, stride, padding, residual, memory,
        activation, se_activation, gate,
    )  # fmt: skip


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call of these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
