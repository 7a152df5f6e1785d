"""Whether somebody records or watches the operators: each question in one place.

Kernels write through addresses, which nobody who records operators sees.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from effnet_fast.backends import in_transform as in_transform
from effnet_fast.modules.structure import PLAIN


def is_traced() -> bool:
    """Whether torch.jit.trace or torch.export records the call."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]  # exported implicitly
    return tracing or torch.compiler.is_exporting()


def wants_operators(x: Any) -> bool:
    """Whether x is no plain tensor, or a trace records the call."""
    return type(x) not in PLAIN or is_traced()


def has_observer(x: Tensor) -> bool:
    """Whether anything at all records or intercepts operators on x, a TorchDispatchMode too."""
    return wants_operators(x) or in_transform() or torch._C._len_torch_dispatch_stack() > 0


def is_recorded() -> bool:
    """Whether a trace, a transform, fake tensors or proxies record the call.

    Other dispatch modes, such as those that count operators, only look on.
    """
    # Where the module was never imported, nobody traces by it.
    proxies: Any = sys.modules.get("torch.fx.experimental.proxy_tensor")
    by_proxies = proxies is not None and proxies.get_proxy_mode() is not None
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    return is_traced() or fake or by_proxies or in_transform()


def can_run_again(x: Tensor) -> bool:
    """Whether a module may run again in backward: where nobody but autograd records it."""
    plain = torch.is_grad_enabled() and isinstance(x, Tensor)
    return plain and not is_traced() and not in_transform()
