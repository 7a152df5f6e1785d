"""Whether a mode of torch's intercepts operators, or a profiler records them."""

from __future__ import annotations

from typing import Any

import torch
from torch._C._autograd import _profiler_enabled
from torch.utils._device import DeviceContext


def is_intercepted() -> bool:
    """Whether a TorchFunctionMode or a TorchDispatchMode is active.

    Such a mode may give operators another meaning, and one that only counts them would count none.
    `torch.set_default_device` and `with torch.device` work by a mode too; it concerns no operator
    that has an input, and is always the first.
    """
    functions = torch._C._len_torch_function_stack()
    if functions > 1 or (functions == 1 and type(function_mode(0)) is not DeviceContext):
        return True
    return torch._C._len_torch_dispatch_stack() > 0


def function_mode(place: int) -> Any:
    """The TorchFunctionMode at a place of the stack."""
    return torch._C._get_function_stack_at(place)


def are_operators_watched() -> bool:
    """Whether somebody sees which operators run: then all that are registered do."""
    return is_intercepted() or torch.jit.is_tracing() or _profiler_enabled()
