"""The gate of an engine: images that have memory, which its kernels read as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from effnet_fast.backends.base import PLAIN
from effnet_fast.ops.gate import gate


@functools.cache
def _gate(device: str, dtypes: tuple[torch.dtype, ...]) -> Callable[[Tensor], None]:
    return gate("a packed network", {"x": "image NCHW"}, (device,), dtypes)


def checked(x: Tensor, device: str, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """x [N,C,H,W] as kernels may read it: itself, or a copy where torch keeps its sign in a bit.

    Args:
        x: the images, of any strides.
        device: the type of the engine's device.
        dtypes: that the engine takes.

    Raises:
        TypeError: x is of a subclass of torch.Tensor or of another dtype.
        ValueError: x is not [N,C,H,W].
        RuntimeError: x is on another type of device, or has no memory.
    """
    if type(x) in PLAIN:
        x = x.resolve_neg()
    _gate(device, dtypes)(x)
    return x
