"""Memory for tensors that live inside one block, reused from block to block of a forward pass.

Large blocks of fresh memory cost a page fault per 4 KiB, about as much as computing on them: in B7
at 600 a quarter of the time. The expanded tensors of an MBConv never leave it, so one buffer each
serves the whole network; it is freed when the network's forward ends.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

_local = threading.local()


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Keeps the buffers of `empty_nhwc` until the outermost scope of this thread ends."""
    if getattr(_local, "buffers", None) is not None:
        yield
        return
    _local.buffers = {}
    try:
        yield
    finally:
        _local.buffers = None


def empty_nhwc(slot: str, like: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """An uninitialised channels_last tensor [N,C,H,W] with the dtype and device of `like`.

    Inside a `scope`, tensors of one slot share memory: asking for the next ends the use of the
    last. Outside of one it is fresh memory.
    """
    n, c, h, w = shape
    size = n * c * h * w
    buffers = getattr(_local, "buffers", None)
    if buffers is None:
        flat = torch.empty(size, dtype=like.dtype, device=like.device)
    else:
        key = (slot, like.dtype, like.device)
        flat = buffers.get(key)
        if flat is None or flat.numel() < size:
            flat = buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
    return flat[:size].view(n, h, w, c).permute(0, 3, 1, 2)
