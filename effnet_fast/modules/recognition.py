"""What a module was read as, remembered for as long as nothing that its reader saw has changed.

A reader looks at some twenty modules at every call, which takes longer than all else that a block
does in Python. What it saw is compared instead, object by object, in one call into C++
(csrc/bindings/watch.cpp): classes and what is set on them, every entry of the modules' `__dict__`s
and tables, that children have no hooks, and how the tensors lie in memory. A module is read anew
where one of these is another, or could become another unseen. Code below a module and hooks of all
modules are asked for at every call, as ever.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from effnet_fast.backends import native
from effnet_fast.modules import structure, tensor_bytes
from effnet_fast.modules.dense_block import Found
from effnet_fast.modules.structure import Block, FrozenNorm, RefusedError

LONGEST_WAIT = 31  # readings until a module that changes all the time is watched again
_TABLES = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Attributes of modules that no reader looks at, or whose entries are watched beside them.
_OWN = frozenset(vars(nn.Module())) | {"_reversed_padding_repeated_twice"}
_CONSTANTS = (bool, int, float, str, type(None))


class Recognised(NamedTuple):
    """What a module was read as, and what was decided about it, which holds as long."""

    found: Found
    decided: dict[Any, Any]  # by whoever decides


class _Watched(NamedTuple):
    """A reading, and what tells whether another would give the same."""

    recognised: Recognised
    watch: Any  # a `_C.Watch`
    checks: tuple[Callable[[], None], ...]  # of code that no table of a block has


class _Known:
    """The latest reading of a module."""

    __slots__ = ("_next_wait", "_wait", "_watched")

    def __init__(self) -> None:
        self._wait = self._next_wait = 0
        self._watched: _Watched | None = None

    def current(self, module: nn.Module) -> Recognised | None:
        """What the module would be read as; None where only its reader can tell."""
        watched = self._watched
        if watched is None or not watched.watch.holds(1, module):
            return None
        try:
            for require in watched.checks:
                require()
        except RefusedError:
            return None
        return watched.recognised

    def learn(self, module: nn.Module, reader: Callable[..., Found]) -> Recognised:
        """Reads the module, and watches it unless it has changed too often."""
        if self._watched is not None:
            self._watched, self._wait = None, self._next_wait
            self._next_wait = min(2 * self._next_wait + 1, LONGEST_WAIT)
        if self._wait > 0:
            self._wait -= 1
            return Recognised(reader(module), {})
        # It is watched before it is read: another thread may change it at this moment.
        watch = _watch(module)
        recognised = Recognised(reader(module), {})
        if watch is None or _depends_on_more(recognised.found):
            self._wait = LONGEST_WAIT
        elif watch.holds(1, module):
            self._watched = _Watched(recognised, watch, tuple(_checks(recognised.found)))
        return recognised


# Copies and pickles of a module have none; a watch does not keep its module.
_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def recognise(module: nn.Module, *arguments: Any) -> Recognised:
    """As `structure.structure_of`.

    Raises:
        RefusedError: the module has no fused form, with the reason.
    """
    reader = structure.reader_of(module)
    if arguments:
        return Recognised(reader(module, *arguments), {})
    known = _known.get(module)
    if known is None:
        _known[module] = _Known()  # most modules that are read once are never read again
        return Recognised(reader(module), {})
    return known.current(module) or known.learn(module, reader)


def _depends_on_more(found: Found) -> bool:
    """Whether a reader looks at autocast or process groups, too."""
    return any(type(layer.bn) in (FrozenNorm, nn.SyncBatchNorm) for layer in found.layers)


def _checks(found: Found) -> Iterator[Callable[[], None]]:
    """What raises RefusedError where the code of an activation or a gate has been replaced."""
    names = {layer.activation for layer in found.layers}
    if isinstance(found, Block):
        names |= {found.se_activation, found.gate}
    for name in sorted(names & structure.activation_checks.keys()):
        yield structure.activation_checks[name]


def _watch(module: nn.Module) -> Any:
    """A `_C.Watch` over the module and all below it; None where a change could go unseen."""
    below = [child for child in module.modules() if child is not module]
    if not tensor_bytes.bytes_tell() or not all(map(_is_plain, (module, *below))):
        return None
    tables = [vars(part)[name] for part in (module, *below) for name in _TABLES]
    tensors = [
        t
        for part in (module, *below)
        for t in (*part._parameters.values(), *part._buffers.values())
        if t is not None
    ]
    buffers = [b for part in (module, *below) for b in part._buffers.values() if b is not None]
    if any(buffer.requires_grad for buffer in buffers):
        return None
    return native.load().Watch(
        owners=[],
        listings=[table for table in tables if table],
        empty=[t for t in tables if not t] + [vars(part)[h] for part in below for h in _HOOKS],
        versioned=[],
        tensors=list({id(t): t for t in tensors}.values()),
        layout=tensor_bytes.layout,
        places=[],
        spans=[],
        kept=[],
        tensor_type=torch.Tensor,
        bytes_tell=True,
        types=list({type(part) for part in (module, *below)}),
        constants=buffers,
        whole=below,
        top=module,
    )


def _is_plain(module: nn.Module) -> bool:
    """Whether all that a reader may see of a module is compared by identity."""
    state = vars(module)
    if not _OWN - {"_reversed_padding_repeated_twice"} <= state.keys():
        return False
    tables = (state[name] for name in (*_TABLES, *_HOOKS))
    if any(type(table) not in (dict, OrderedDict) for table in tables):
        return False
    return all(_is_constant(value) for name, value in state.items() if name not in _OWN)


def _is_constant(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return isinstance(value, (*_CONSTANTS, torch.dtype))
