"""Memory of the large results that training makes anew in every step, kept on the CPU.

The C library gives blocks of more than 32 MiB back to the system, and fresh memory costs a page
fault per 4 KiB. What autograd saves of a block therefore lies in memory of this package's own,
which stays for the next step (csrc/bindings/buffers.cpp). Together with what is in use it is at
most a quarter more than was ever in use at one time; what lies idle is at most `limit_bytes()`.
`effnet_fast.empty_cache` gives it back.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.backends import native

MIN_BYTES = 32 << 20  # the C library keeps smaller blocks by itself
VARIABLE = "EFFNET_FAST_KEPT_BYTES"
_SHARE = 8  # of the machine's memory, where the user names no limit


@functools.cache
def limit_bytes() -> int:
    """The most bytes that are kept: those of EFFNET_FAST_KEPT_BYTES, or an eighth of the memory.

    Raises:
        ValueError: the variable holds no whole number of at least 0.
    """
    named = os.environ.get(VARIABLE, "").strip()
    if named:
        if not named.isdecimal():
            raise ValueError(f"{VARIABLE}={named!r}: it must be a number of bytes, 0 to keep none")
        return int(named)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _SHARE
    except (AttributeError, OSError, ValueError):  # no such number on this system
        return 1 << 30


@functools.cache
def _buffers() -> Any:
    return native.load().Buffers(Tensor, nn.Parameter, limit_bytes())


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised tensor without gaps, with the dtype and device of `like`.

    A tensor of four dimensions is channels_last. Its storage cannot be resized where the memory is
    kept, so users are handed none of these as a result.
    """
    size = like.element_size()
    for n in shape:
        size *= n
    if (
        size < MIN_BYTES
        or like.device.type != "cpu"
        or like.dtype not in (torch.float32, torch.bfloat16)
        or limit_bytes() == 0
        or torch.are_deterministic_algorithms_enabled()  # torch.empty then fills what it gives
    ):
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)
    return _buffers().empty(shape, like.dtype is torch.bfloat16)


def kept_bytes() -> tuple[int, int]:
    """Bytes in use by tensors, and bytes kept for the next ones."""
    return _buffers().bytes() if native.unavailable_reason() is None else (0, 0)


def release() -> None:
    """Frees what no tensor uses."""
    if native.unavailable_reason() is None:
        _buffers().release()
