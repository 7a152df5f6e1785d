"""The C++ kernels on the CPU."""

from __future__ import annotations

import torch

from effnet_fast.backends import native
from effnet_fast.backends.base import Backend, OpArgs, kernel_reason
from effnet_fast.reference.activations import ACTIVATIONS, GATES

NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def _reason(op: str, args: OpArgs | None, isa: str) -> str | None:
    if reason := native.unavailable_reason():
        return reason
    if isa and (missing := native.load().isa_unavailable_reason(isa)):
        return f"cpu:{isa}: {missing}"
    if args is None:
        return None
    if args.x.device.type != "cpu":
        return f"x is on {args.x.device}, the cpu backend takes CPU tensors"
    return kernel_reason(CPU, op, args)


CPU = Backend(
    "cpu", NATIVE_DTYPES, ("cpu",), _reason, activations=ACTIVATIONS, gates=(*GATES, None)
)
