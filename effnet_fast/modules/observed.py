"""Whether somebody records, watches or replaces the operators: each question in one place.

Kernels write through addresses, which nobody who records operators sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from effnet_fast.backends import in_transform as in_transform
from effnet_fast.backends.base import PLAIN
from effnet_fast.backends.interception import function_mode
from effnet_fast.backends.interception import is_intercepted as is_intercepted


def is_traced() -> bool:
    """Whether torch.jit.trace or torch.export records the call."""
    tracing = torch.jit.is_tracing()
    return tracing or torch.compiler.is_exporting()


def interceptor() -> str | None:
    """The class of the mode for which `is_intercepted` says so, in words; None for none."""
    if not is_intercepted():
        return None
    for place in reversed(range(torch._C._len_torch_function_stack())):
        if type(mode := function_mode(place)) is not DeviceContext:
            return f"{type(mode).__name__}, a TorchFunctionMode, is active"
    mode = torch.utils._python_dispatch._get_current_dispatch_mode()
    return f"{type(mode).__name__}, a TorchDispatchMode, is active"


def wants_operators(x: Any) -> bool:
    """Whether x is no plain tensor, a trace records the call, or a mode intercepts it."""
    return type(x) not in PLAIN or is_traced() or is_intercepted()


def has_observer(x: Tensor) -> bool:
    """Whether anything at all records or intercepts operators on x."""
    return wants_operators(x) or in_transform()


def recorder() -> str | None:
    """What records or intercepts operators, whatever they are called with, in words."""
    if is_traced():
        return "torch.jit.trace or torch.export is at work"
    if in_transform():
        return "a torch.func transform or forward-mode differentiation is at work"
    return interceptor()


def can_run_again(x: Tensor) -> bool:
    """Whether a module may run again in backward: where nobody but autograd records it."""
    plain = torch.is_grad_enabled() and isinstance(x, Tensor)
    return plain and not is_traced() and not in_transform()
