"""What tells how a tensor lies in memory, and whether the bytes of torch's own objects show it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from effnet_fast.backends import native


@functools.cache
def bytes_tell() -> bool:
    """Whether the bytes of torch's own objects show how a tensor lies in memory.

    They do in torch 2.13. Where another version keeps something beyond them, every call asks each
    tensor instead, which takes half a millisecond for B0.
    """
    return all(
        _is_shown(change)
        for change in (
            lambda t: t.transpose(0, 1),
            lambda t: t[:1],
            lambda t: t.view(torch.int32),
            torch._neg_view,
        )
    )


def _is_shown(change: Callable[[Tensor], Tensor]) -> bool:
    """Whether the bytes show that a tensor became another view of its memory."""
    tensor, asked = torch.zeros(3, 3), list[Tensor]()
    watch = native.load().Watch(
        owners=[],
        listings=[],
        empty=[],
        versioned=[],
        tensors=[tensor],
        layout=asked.append,  # whose result is always the same
        places=[],
        spans=[],
        kept=[],
        tensor_type=torch.Tensor,
        bytes_tell=True,
    )
    before = len(asked)
    tensor.data = change(tensor.data)
    watch.holds(1)
    return len(asked) > before


def layout(tensor: Tensor) -> tuple[object, ...]:
    """What tells how to read the memory at a tensor's address."""
    return (
        *(tensor.shape, tensor.stride(), tensor.dtype, tensor.layout, tensor.device),
        *(tensor.is_neg(), tensor.is_conj()),
    )
