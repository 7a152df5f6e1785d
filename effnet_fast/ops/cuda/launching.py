"""What the launchers share: the extension, the stream, dtypes and addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effnet_fast.backends import native
from effnet_fast.ops.registration import address, dense

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cuda/args.h

_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def launchers(backend: str) -> Any:
    """The module of launchers: the device's, or the host run's for "simt"."""
    return native.load_simt().cuda if backend == "simt" else native.load().cuda


def queue(x: Tensor) -> tuple[int, int]:
    """The device of x and the address of its current stream; never to be kept."""
    if x.device.type == "cpu":
        return 0, 0
    index = x.device.index
    if _raw_stream is not None:
        return index, _raw_stream(index)
    return index, torch.cuda.current_stream(index).cuda_stream


class Bn:
    """A BatchNorm's vectors [C] as the kernels take them; keeps alive what was converted.

    Weight and bias stay in the dtype that both have, mean and variance in theirs. Where the two of
    a pair differ, or no kernel has their dtype, they become fp32.
    """

    def __init__(self, vectors: Sequence[Tensor | None] | None, eps: float = 0.0) -> None:
        """vectors: weight, bias, mean, var, the first two None for 1 and 0; None for no BN."""
        self.eps = eps
        self.vectors = None if vectors is None else [*_alike(*vectors[:2]), *_alike(*vectors[2:])]

    @property
    def arguments(self) -> tuple[tuple[int, ...], int, int, float]:
        """Addresses, the dtype of weight and bias, that of mean and variance, eps."""
        if self.vectors is None:
            return (0, 0, 0, 0), 0, 0, self.eps
        weight, bias, mean, _ = self.vectors
        affine = weight if weight is not None else bias
        return (
            tuple(address(v) for v in self.vectors),
            0 if affine is None else DTYPES[affine.dtype],
            DTYPES[mean.dtype],
            self.eps,
        )


def _alike(*vectors: Tensor | None) -> list[Any]:
    """The vectors without gaps, in their dtype where that is one of the kernels', else in fp32."""
    found = {v.dtype for v in vectors if v is not None}
    dtype = found.pop() if len(found) == 1 and found <= DTYPES.keys() else torch.float32
    return [None if v is None else dense(v, dtype) for v in vectors]


def scratch(like: Tensor, *sizes: int) -> Tensor:
    """Uninitialised fp32 memory on the device and stream of `like`."""
    return torch.empty(sizes, dtype=torch.float32, device=like.device)
