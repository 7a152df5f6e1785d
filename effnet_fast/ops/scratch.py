"""Memory for tensors that live inside one block, reused from block to block of a forward pass.

Large blocks of fresh memory cost a page fault per 4 KiB, about as much as computing on them: in B7
at 600 a quarter of the time. The expanded tensors of an MBConv never leave it, so one buffer each
serves the whole network, and up to KEPT_BYTES of them stay with the thread for its next forward,
whichever model's, until the thread ends or calls `release`. What is freed here `buffers` keeps.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from effnet_fast.ops import buffers

KEPT_BYTES = 128 << 20  # per thread; B7's at 600x600 take 92 MB

_local = threading.local()


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Shares the buffers of `empty_nhwc` until the outermost scope of this thread ends."""
    if getattr(_local, "active", False):
        yield
        return
    try:
        _local.active = True
        if not hasattr(_local, "buffers"):
            _local.buffers = {}
        yield
    finally:
        _local.active = False
        if kept_bytes() > KEPT_BYTES:
            release()


def kept_bytes() -> int:
    """Bytes of the buffers that this thread holds."""
    return sum(flat.nbytes for flat in getattr(_local, "buffers", {}).values())


def release() -> None:
    """Frees this thread's buffers."""
    _local.buffers = {}


def empty_cache() -> None:
    """Frees the CPU memory that is kept for the next step and that no tensor uses.

    It is this thread's scratch memory, and what training keeps of its activations: up to an eighth
    of the machine's memory, or EFFNET_FAST_KEPT_BYTES of the environment. Nothing is wrong without
    a call. On a GPU `torch.cuda.empty_cache` does the same.
    """
    release()
    buffers.release()


def _fresh(like: Tensor, size: int) -> Tensor:
    """Memory of so many elements, kept by `buffers` where it is large."""
    if size * like.element_size() < buffers.MIN_BYTES:
        return torch.empty(size, dtype=like.dtype, device=like.device)
    return buffers.empty(like, (size,))


def empty_nhwc(slot: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised channels_last tensor [N,C,H,W] with the dtype and device of `like`.

    Inside a `scope`, tensors of one slot share memory: asking for the next ends the use of the
    last. Outside of one it is fresh memory.
    """
    n, c, h, w = shape
    size = n * c * h * w
    if not getattr(_local, "active", False):
        flat = _fresh(like, size)
    else:
        held = _local.buffers
        # Outside of inference mode torch writes to no tensor that was made inside.
        key = (slot, like.dtype, like.device, torch.is_inference_mode_enabled())
        if key in held and held[key].numel() < size:
            del held[key]  # before the larger one is there
        if key not in held:
            held[key] = _fresh(like, size)
        flat = held[key]
    return flat.as_strided(shape, (h * w * c, 1, w * c, c))
