"""What the ops share: registration with torch.library and the way from tensors to the extension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effnet_fast import backends

_LIBRARY = torch.library.Library("effnet_fast", "DEF")


def register(schema: str, cpu: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Registers `effnet_fast::<schema>` with its CPU kernel and its fake; returns the op.

    The schema's last argument is the resolved backend, which launches the op; `launchers` names
    those of the other backends. An op without that argument has its CPU kernel alone.
    """
    name = schema.split("(")[0]
    backends.CPU.add_launcher(name, cpu)

    def run(*args: Any) -> Any:
        return backends.launcher_of(args[-1], name)(*args)

    _LIBRARY.define(schema)
    if "str backend)" in schema:
        _LIBRARY.impl(name, run, "CPU")
        _LIBRARY.impl(name, run, "CUDA")
    else:
        _LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"effnet_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.effnet_fast, name).default


def isa_of(backend: str) -> str:
    """The instruction set that a resolved backend names, "" for the best one."""
    return backends.parse(backend)[1]


def nhwc(x: Tensor) -> Tensor:
    """x [N,C,H,W] with its values in NHWC order and no gaps; x itself where they are."""
    return x.contiguous(memory_format=torch.channels_last)


def channels_last(x: Tensor) -> Tensor:
    """x [N,C,H,W] itself where C is innermost, whatever the other strides; else as `nhwc`."""
    return x if backends.is_channels_last(x) else nhwc(x)


def empty_nhwc(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised channels_last tensor of `shape` with the dtype and device of `like`."""
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor without gaps in `dtype`; itself where it is that already."""
    if tensor.dtype is dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()


def fp32(vector: Tensor | None) -> Tensor | None:
    """A vector [C] as the kernels read it, fp32 without gaps; None stays None."""
    return None if vector is None else dense(vector, torch.float32)


def address(tensor: Tensor | None) -> int:
    """The tensor's address, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def native_weight(weight: Tensor, x: Tensor) -> Tensor:
    """A weight without gaps in x's dtype or fp32, whichever it has; fp32 otherwise."""
    if weight.dtype is not torch.float32 and weight.dtype is not x.dtype:
        weight = weight.float()
    return weight if weight.is_contiguous() else weight.contiguous()


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(x: Tensor) -> Tensor:
    """x as a convolution under autocast would take it; x itself outside of autocast."""
    if not autocasts(x) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))
