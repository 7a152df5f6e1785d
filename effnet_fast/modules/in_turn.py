"""Modules called one after another, in channels_last where nobody can see it.

A user sees activations in the layout that stock PyTorch gives them: contiguous for contiguous
images and weights. The kernels give channels_last. A module that is called by itself therefore
converts its result; modules that are called in turn convert only where somebody looks: at what
comes out, and around a module with a hook or with code that is not PyTorch's or this package's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.modules import observed, structure
from effnet_fast.ops.layout import is_nhwc, makes_nhwc, to_nchw, to_nhwc

# Modules of these packages compute the same in every layout, and show it to nobody.
_BLIND = ("torch.nn.modules.", __name__.removesuffix("in_turn"))
# In training these draw a number for each element, in the order of memory.
_DRAWS = (nn.Dropout, nn.AlphaDropout, nn.RReLU)
_blind_kinds: set[type] = set()  # classes that have been found there
gates: set[type] = set()  # classes whose result has their input's layout, whatever their weights


class _Thread(threading.local):
    hidden = False


_thread = _Thread()


def is_hidden() -> bool:
    """Whether nobody sees the result of the module that runs: it may have any layout."""
    return _thread.hidden


def looks_away(kind: type) -> None:
    """Enters a class that computes the same in every layout, and shows it to nobody."""
    _blind_kinds.add(kind)


def _is_blind(kind: type) -> bool:
    if kind in _DRAWS:
        return False
    if kind.__module__.startswith(_BLIND):
        _blind_kinds.add(kind)
        return True
    return False


def sees(module: nn.Module) -> bool:
    """Whether something in the module sees activations.

    A network is looked through at each forward: 0.3 us for each of B0's 329 modules.
    """
    below: list[Any] = [module]
    for part in below:  # which grows
        if part is None:
            continue
        state, kind = part.__dict__, type(part)
        if structure.is_altered(state):
            return True
        if (
            kind not in _blind_kinds
            and not _is_blind(kind)
            and (part.training or kind not in _DRAWS)
        ):
            return True
        if state["_modules"]:
            below += state["_modules"].values()
    return False


def weights_of(modules: Iterable[nn.Module | None]) -> list[Tensor]:
    """The weights [Cout,Cin/groups,K,K] that decide about the layout of what modules give."""
    weights: list[Tensor] = []
    for module in modules:
        if module is None or type(module) in gates:
            continue
        weight = module._parameters.get("weight")
        if module._modules:
            weights += weights_of(module._modules.values())
        elif weight is not None and weight.dim() == 4:
            weights.append(weight)
    return weights


def _is_free(x: Tensor) -> bool:
    """Whether the layout of what follows x is a choice: x is not channels_last or recorded."""
    if torch.compiler.is_compiling() or observed.wants_operators(x) or observed.in_transform():
        return False
    if x.dim() != 4 or is_nhwc(x):
        return False
    try:
        structure.refuse_global_hooks()
        structure.refuse_replaced_code()
    except structure.RefusedError:
        return False
    return True


class Walk:
    """Calls modules in turn, each on the result of the last.

    Attributes:
        last: what the last module gave, in any layout.
    """

    def __init__(self, x: Tensor) -> None:
        self.last = x
        self._free = _is_free(x)
        self._passed: list[nn.Module] = []  # whose weights nobody has asked yet
        self._shown: Tensor | None = None  # the last result as it was handed out

    def call(self, module: nn.Module, **arguments: Any) -> None:
        """Calls the next module, with what it takes beside the last result."""
        if not self._free:
            self.last, self._shown = module(self.last, **arguments), None
            return
        if sees(module):
            # What is handed out is what the module sees, as in stock: it may edit it in place.
            self.last, self._shown = module(self.result(), **arguments), None
            self._passed = []
            self._free = _is_free(self.last)  # the module decided as stock does
            return
        x, self._shown = self.last, None
        before, _thread.hidden = _thread.hidden, True
        try:
            # Fused modules take what they get: the stem's kernel takes images in any layout.
            if hasattr(module, "forward_stock"):
                self.last = module(x, *arguments.values())  # to bind names takes 5 us
            else:
                self.last = module(to_nhwc(x), **arguments)
        finally:
            _thread.hidden = before
        self._passed.append(module)
        self._free = isinstance(self.last, Tensor) and self.last.dim() == 4

    def call_as_one(
        self, modules: Collection[nn.Module], run: Callable[[Tensor], Tensor | None]
    ) -> None:
        """Calls the next modules by one function, or in turn where it gives None."""
        before, _thread.hidden = _thread.hidden, self._free
        try:
            y = run(self.last)
        finally:
            _thread.hidden = before
        if y is None:
            for module in modules:
                self.call(module)
            return
        self.last, self._shown = y, None
        self._passed += modules

    def result(self) -> Tensor:
        """What the last module gave, in stock's layout."""
        if self._shown is None:
            if self._free and makes_nhwc(weights_of(self._passed)):
                self._free = False
            self._passed = []
            self._shown = to_nchw(self.last) if self._free else self.last
        return self._shown


def call_hidden(module: nn.Module, x: Tensor) -> Tensor:
    """The result of a module that does not see x, both in any layout."""
    before, _thread.hidden = _thread.hidden, True
    try:
        y: Tensor = module(x)
        return y
    finally:
        _thread.hidden = before


def as_stock(y: Tensor, x: Tensor, modules: Iterable[nn.Module]) -> Tensor:
    """What modules in turn give of x, in the layout that stock gives it."""
    return y if is_nhwc(x) or makes_nhwc(weights_of(modules)) else to_nchw(y)


def run(
    modules: Iterable[nn.Module], x: Tensor, taken: Collection[int] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Calls modules in turn.

    Returns:
        the last one's result, and those of the modules at the places `taken`, in their order.
    """
    walk, maps = Walk(x), []
    for index, module in enumerate(modules):
        walk.call(module)
        if index in taken:
            maps.append(walk.result())
    return walk.result(), maps
