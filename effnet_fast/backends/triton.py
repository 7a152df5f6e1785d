"""The Triton kernels. Triton is imported when they are first asked for."""

from __future__ import annotations

import functools
import importlib

import torch

from effnet_fast.backends import native
from effnet_fast.backends.base import Backend, OpArgs, kernel_reason

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _unavailable_reason() -> str | None:
    try:
        kernels = importlib.import_module("effnet_fast.triton_kernels.launching")
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install 'effnet-fast[triton]'"
    return native.foreign_reason(kernels)


def _interprets() -> bool:
    return importlib.import_module("effnet_fast.triton_kernels.launching").INTERPRETS


def _device_reason(device: torch.device) -> str | None:
    if device.type == "cpu":
        if _interprets():
            return None
        return (
            "x is on cpu, the triton backend takes CUDA tensors; CPU tensors only in a process "
            "started with TRITON_INTERPRET=1, for tests"
        )
    if device.type != "cuda":
        return f"x is on {device}, the triton backend takes CUDA tensors"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"{device} has compute capability {major}.{minor}; 8.0 and newer is supported"
    return None


def _reason(op: str, args: OpArgs | None, isa: str) -> str | None:
    # The extension has the check of what goes to a kernel.
    if reason := native.unavailable_reason() or _unavailable_reason():
        return reason
    if args is None:
        if torch.cuda.is_available():
            return _device_reason(torch.device("cuda", torch.cuda.current_device()))
        return None if _interprets() else "there is no CUDA device"
    if reason := _device_reason(args.x.device):
        return reason
    if args.x.dtype is torch.bfloat16 and _interprets():
        return "x is torch.bfloat16, which Triton's interpreter computes wrongly"
    return kernel_reason(TRITON, op, args)


# On a CPU in the interpreter.
TRITON = Backend(
    *("triton", TRITON_DTYPES, ("cuda", "cpu"), _reason),
    activations=("silu", "identity", "relu", "relu6"),  # SiLU and clamps
    gates=("sigmoid", "hardsigmoid", None),
)
