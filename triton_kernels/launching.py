"""What the launchers share: the way from tensors to a kernel, and shapes and types on it.

Kernels get a channel count, and strides, as a number of units of VEC channels, VEC being a constant
of the kernel: the compiler then knows that rows begin at multiples of VEC, which it needs for
accesses of 128 bits, and one compiled kernel still serves every count that VEC divides.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from effnet_fast.reference.activations import kernel_activation

Kernel = Any  # triton.JITFunction, or its interpreted form
BatchNorm = Sequence[Tensor | None]  # weight, bias, mean, var [C]
NO_BN: BatchNorm = (None,) * 4
VEC = 8  # channels: 16 bytes in 16-bit types
_ACTS = ("silu", "clamp")  # by kind of csrc/common/activation.h


@triton.jit
def _probe():
    pass


# Whether kernels run in Triton's interpreter, on CPU tensors: decided as they are decorated.
INTERPRETS = not isinstance(_probe, triton.JITFunction)


def launch(
    kernel: Kernel,
    grid: Sequence[int],
    device: torch.device,
    args: Sequence[Any],
    config: dict[str, int],
    **constants: Any,
) -> None:
    """Launches a kernel on the current stream of `device`.

    Args:
        kernel: a jitted function.
        grid: numbers of programs; nothing is launched where one is 0.
        device: of all tensors in `args`.
        args: the positional arguments, None for tensors that are absent.
        config: a row of the tuning table: tile sizes, num_warps and num_stages.
        constants: the kernel's other constants.
    """
    if 0 in grid:
        return
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if other else contextlib.nullcontext():
        start(kernel, tuple(grid), args, config | constants)


def start(
    kernel: Kernel, grid: tuple[int, ...], args: Sequence[Any], constants: dict[str, Any]
) -> None:
    """Runs a kernel; where launches are recorded instead of run, this is replaced."""
    # Multiply and add may fuse: a Triton release is to change the default.
    kernel[grid](*args, **constants, enable_fp_fusion=True)


def activation_constants(activation: str) -> tuple[str, tuple[float | None, float | None]]:
    """An activation as kernels take it: their constant ACT, and their arguments lo and hi.

    SiLU and the identity have no bounds, which are None then, and a build each. All other clamps
    share one: of a bound that is NaN no comparison is true.

    Raises:
        ValueError: no kernel has the activation.
    """
    kind, lo, hi = kernel_activation(activation)
    if kind >= len(_ACTS):
        known = " and ".join(_ACTS)
        raise ValueError(f"activation: the Triton kernels have {known}, got {activation!r}")
    bounds = (None, None) if math.isnan(lo) and math.isnan(hi) else (lo, hi)
    return _ACTS[kind], bounds


def units(*sizes: int) -> tuple[int, ...]:
    """VEC and the channel counts or strides in units of it; VEC is 1 where 8 divides not all."""
    vec = 1 if any(size % VEC for size in sizes) else VEC
    return vec, *(size // vec for size in sizes)


def pixel_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of x [N,C,H,W] over N, H and W; 0 where a size of 1 leaves the stride unused."""
    return tuple(0 if x.shape[i] == 1 else x.stride(i) for i in (0, 2, 3))


def nhwc(x: Tensor) -> Tensor:
    """x [N,C,H,W] with its values in NHWC order and no gaps; x itself where they are."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_nhwc(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised channels_last tensor of `shape` with the dtype and device of `like`."""
    return torch.empty(
        tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def dense(vector: Tensor | None) -> Tensor | None:
    """The tensor without gaps; itself where it has none, None for None."""
    return None if vector is None else vector.contiguous()


def empty_fp32(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised fp32 tensor on the device of `like`."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def dot_precision(dtype: torch.dtype) -> str:
    """ "ieee", or "tf32" for fp32 products where torch.backends.cuda.matmul allows it.

    AMD's GPUs refuse "tf32".
    """
    allowed = torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"
