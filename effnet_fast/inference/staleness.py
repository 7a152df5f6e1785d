"""Whether a network is still what its packed weights were made of: a check for every call.

What decides about a result is compared by identity, object by object: the modules' tables and
settings and what stands in them, that nothing hooks into them. Of the tensors come the version
counter, address, sizes and strides, and their memory on a CPU: every byte by checksums, or a few
values each, which edits of others through `.data` escape. Values on a GPU are never read, for that
would wait for it. It is one call into C++ (csrc/bindings/watch.cpp).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from effnet_fast.backends import native
from effnet_fast.modules import structure, tensor_bytes
from effnet_fast.modules.structure import METHODS, RefusedError

HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # others do nothing without a gradient
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
TABLES = ("_modules", "_parameters", "_buffers")
_CONSTANTS = (bool, int, float, str, BuiltinFunctionType)


def watch(
    modules: Iterable[nn.Module],
    tensors: Iterable[Tensor | None],
    every_byte: bool,
    observed: Sequence[nn.Module] = (),
) -> Any:
    """A `_C.Watch`: its `holds(threads)` tells whether nothing has changed since.

    Bytes count from its `remember(threads)` on, to be called before they are packed.

    Args:
        modules: those that are watched, without their children; none may be the network, of which
            no reference is kept.
        tensors: those that are watched.
        every_byte: whether CPU tensors are compared by checksums of all their bytes, instead of by
            a few values each.
        observed: modules whose forward hooks the caller calls, and looks at by itself.

    Raises:
        RefusedError: a module's settings or names are such that a change could not be seen.
    """
    everywhere = {name: nn_module.__dict__[name] for name in GLOBAL_HOOKS}
    owners: list[tuple[object, dict[str, object], list[str]]] = [(nn_module, everywhere, [])]
    empty: list[Any] = list(everywhere.values())
    listings: list[dict[str, Any]] = []
    for module in modules:
        state = module.__dict__
        tables = [state[name] for name in TABLES]
        methods = [name for name in METHODS if hasattr(type(module), name)]
        absent = [name for name in methods if name not in state]
        absent += (name for table in tables for name in table)
        _require_constants(module)
        if any(type(t) not in (dict, OrderedDict) for t in (*tables, *(state[h] for h in HOOKS))):
            raise RefusedError("a module's table is no dict of Python's own")
        _require_one_of_each([*state, *absent])
        # An instance's own method is a None, see `structure.patched_method`.
        own = (name for name in methods if name in state)
        settings = structure.SETTINGS.get(type(module), ())
        absent += [name for name in settings if name not in state and name not in absent]
        present = (*HOOKS, *TABLES, *(name for name in settings if name in state), *own)
        owners.append((module, {name: state[name] for name in present}, absent))
        empty += (state[name] for name in (HOOKS[1:] if module in observed else HOOKS))
        listings += filter(None, tables)
    watched = _held(tensors, listings)
    kept = [t.detach() for t in watched]  # the memory that is read, until the watch is gone
    on_cpu = [t for t in kept if t.device.type == "cpu" and t.numel()]
    for tensor in on_cpu:
        _require_memory(tensor)
    native_watch = native.load().Watch(
        owners=owners,
        listings=listings,
        empty=empty,
        versioned=[t for t in watched if not t.is_inference()],  # others keep no counter
        tensors=watched,
        layout=tensor_bytes.layout,
        places=[] if every_byte else [_place(t) for t in on_cpu],
        spans=list(dict.fromkeys(_span(t) for t in on_cpu)) if every_byte else [],
        kept=kept,
        tensor_type=torch.Tensor,
        bytes_tell=tensor_bytes.bytes_tell(),
    )
    lists = [v for owner in owners for value in owner[1].values() for v in _lists_in(value)]
    return _WatchOfLists(native_watch, lists) if lists else native_watch


def _held(tensors: Iterable[Tensor | None], listings: list[dict[str, Any]]) -> list[Tensor]:
    """The tensors that modules hold, in the place of views of whole ones, too.

    A linear layer's weight may be read as a convolution's.
    """
    tables = [t for listing in listings for t in listing.values() if isinstance(t, Tensor)]
    held = {id(t): t for t in tables}
    found: dict[int, Tensor] = {}
    for tensor in tensors:
        if tensor is None:
            continue
        if id(tensor) not in held:
            place = tensor.data_ptr(), tensor.numel()
            tensor = next((t for t in tables if (t.data_ptr(), t.numel()) == place), None)
            if tensor is None:
                raise RefusedError("another thread changes it at this moment")
        found[id(tensor)] = tensor
    return list(found.values())


class _WatchOfLists:
    """A watch that compares lists among the settings by their values, too.

    efficientnet_pytorch keeps strides in lists, which somebody may edit.
    """

    def __init__(self, native_watch: Any, lists: list[list[Any]]) -> None:
        self._watch, self._lists = native_watch, lists
        self._values = [tuple(found) for found in lists]
        self.remember = native_watch.remember

    def holds(self, threads: int) -> bool:
        """As the watch's."""
        same = all(tuple(a) == b for a, b in zip(self._lists, self._values, strict=True))
        return same and bool(self._watch.holds(threads))


def _lists_in(value: object) -> list[list[Any]]:
    """Lists that a setting is, or that a tuple holds."""
    parts = value if isinstance(value, tuple) else (value,)
    return [part for part in parts if isinstance(part, list)]


def _require_constants(module: nn.Module) -> None:
    """Raises RefusedError for a setting that could change and stay the same object."""
    for name in structure.SETTINGS.get(type(module), ()):
        value = module.__dict__.get(name)
        parts = [*value] if isinstance(value, tuple) else [value]
        for found in _lists_in(value):
            parts.remove(found)
            parts += found
        if not all(part is None or isinstance(part, _CONSTANTS) for part in parts):
            raise RefusedError(
                f"the {name} of a {type(module).__name__} is {type(value).__name__}, no constant"
            )


def _require_one_of_each(names: list[str]) -> None:
    """Raises RefusedError where an attribute hides an entry of a module's tables."""
    if len(set(names)) != len(names):
        name = next(name for name, count in Counter(names).items() if count > 1)
        raise RefusedError(f"a module has {name!r} in more than one place")


def _require_memory(tensor: Tensor) -> None:
    """Raises RefusedError for a tensor whose memory was freed, in whole or in part."""
    offset = tensor.storage_offset() * tensor.element_size()
    if tensor.data_ptr() == 0 or tensor.untyped_storage().nbytes() < offset + _span(tensor)[1]:
        raise RefusedError("a parameter or buffer has no memory")


def _place(tensor: Tensor) -> tuple[int, int, int]:
    """Address, elements and bytes of one, of what lies without gaps; else of the first element."""
    dense = tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    return tensor.data_ptr(), tensor.numel() if dense else 1, tensor.element_size()


def _span(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes from a tensor's first element to its last, gaps included."""
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (reach + 1) * tensor.element_size()
