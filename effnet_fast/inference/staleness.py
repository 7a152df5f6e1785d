"""Whether a network is still what its packed weights were made of: a check for every call.

What decides about a result is compared by identity, object by object: the modules' children,
parameters, buffers and settings, that nothing hooks into them; of the tensors the version counter
and the address, and of those on a CPU a few values each, since edits through `.data` move neither.
Values on a GPU are never read, for that would wait for it. All this takes about 50 us for B0 from a
near cache and 160 us between forward passes, in one call into C++ (csrc/bindings/watch.cpp).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from effnet_fast.backends import native
from effnet_fast.modules import layers
from effnet_fast.modules.same_padding import Conv2dSame
from effnet_fast.modules.stochastic_depth import StochasticDepth

HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # others do nothing without a gradient
TABLES = ("_modules", "_parameters", "_buffers")
_CONVOLUTION = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
# What of a module's attributes its output depends on, beside the tables.
SETTINGS: dict[type, tuple[str, ...]] = {
    nn.Conv2d: _CONVOLUTION,
    Conv2dSame: _CONVOLUTION,
    nn.BatchNorm2d: ("training", "eps"),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.Dropout: ("training", "p"),
    StochasticDepth: ("training", "p"),
    layers.MBConv: ("use_res_connect",),
}


def watch(root: nn.Module, modules: Iterable[nn.Module], tensors: Iterable[Tensor | None]) -> Any:
    """A `_C.Watch`: its `holds()` tells whether nothing has changed since.

    Args:
        root: the network; of itself only its children are watched, and no reference is kept.
        modules: those that are watched, without their children.
        tensors: those that are watched; of CPU tensors values too.
    """
    global_hooks = (nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks)
    items: list[tuple[dict[str, Any], str, object]] = []
    absent, listings = [], [root.__dict__["_modules"]]
    empty: list[Any] = list(global_hooks)
    types = []
    for module in modules:
        state = module.__dict__
        types.append(module)
        absent.append((state, "forward"))
        empty += (state[name] for name in HOOKS)
        listings += (state[name] for name in TABLES if state[name])
        items += ((state, name, state[name]) for name in SETTINGS.get(type(module), ()))
    watched = [t for t in tensors if t is not None]
    versioned = [t for t in watched if not t.is_inference()]  # others keep no counter
    kept = [t.detach() for t in watched]  # the memory that is read, until the watch is gone
    return native.load().Watch(
        *(items, absent, listings, empty, types, versioned, watched),
        [_place(t) for t in kept if t.device.type == "cpu"],
        kept,
        [t._cdata for t in watched if hasattr(t, "_cdata")],
        torch.Tensor,
    )


def _place(tensor: Tensor) -> tuple[int, int, int]:
    """Address, elements and bytes of one, of what lies without gaps; else of the first element."""
    dense = tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    count = tensor.numel() if dense else min(tensor.numel(), 1)
    return tensor.data_ptr(), count, tensor.element_size()
