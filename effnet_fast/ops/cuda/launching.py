"""What the launchers share: the extension, the stream, dtypes and addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _native
from ..registration import address, fp32

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cuda/args.h
NO_BN = (0, 0, 0, 0)

_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def native(backend: str) -> Any:
    """The module of launchers: the device's, or the host run's for "simt"."""
    return _native.load_simt().cuda if backend == "simt" else _native.load().cuda


def queue(x: Tensor) -> tuple[int, int]:
    """The device of x and the address of its current stream; never to be kept."""
    if x.device.type == "cpu":
        return 0, 0
    index = x.device.index
    if _raw_stream is not None:
        return index, _raw_stream(index)
    return index, torch.cuda.current_stream(index).cuda_stream


class Bn:
    """The addresses of a BatchNorm's vectors [C] in fp32; keeps alive what was converted."""

    def __init__(self, vectors: Sequence[Tensor | None] | None, eps: float = 0.0) -> None:
        """vectors: weight, bias, mean, var, the first two None for 1 and 0; None for no BN."""
        self.eps = eps
        self.vectors = None if vectors is None else [fp32(vector) for vector in vectors]

    @property
    def addresses(self) -> tuple[int, ...]:
        return NO_BN if self.vectors is None else tuple(address(v) for v in self.vectors)


def scratch(like: Tensor, *sizes: int) -> Tensor:
    """Uninitialised fp32 memory on the device and stream of `like`."""
    return torch.empty(sizes, dtype=torch.float32, device=like.device)
