"""Stem, stages and last convolution as a module of their own, which has a plan of its own.

Whoever takes `model.features`, a slice of it or a sequence that begins with it runs it from packed
weights in eval mode on a CPU, as the network runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effnet_fast import backends
from effnet_fast.inference import parts
from effnet_fast.inference.own_plan import is_training, plan_of
from effnet_fast.inference.parts import Course, Head, Stage, in_order, whole
from effnet_fast.models.execution import on_backend
from effnet_fast.modules import in_turn, layers, stock, structure
from effnet_fast.modules.foreign import FusedSequence
from effnet_fast.modules.structure import RefusedError


class _Parts(NamedTuple):
    """`parts.InferenceParts` of a sequence; without a reference to it."""

    layers: tuple[Any, ...]
    code: stock.Stock = stock.NETWORK
    present: Callable[[Tensor, Any], Any] | None = None

    @property
    def ends_in_layer(self) -> bool:
        """Whether the last child is a convolution, no stage of blocks."""
        kind = type(self.layers[-1])
        return structure.has_reader(kind) and not structure.is_block(kind)

    @property
    def head(self) -> Head | None:
        """The last convolution, which runs after the plan."""
        last = self.layers[-1]
        if not self.ends_in_layer:
            return None
        if in_turn.sees(last):
            return Head(last, False, last, last, last)
        return Head(last, False, last, last, partial(in_turn.call_hidden, last), hides=True)

    @property
    def taps(self) -> tuple[int, ...]:
        return () if self.ends_in_layer else (len(self.layers) - 1,)

    @property
    def identity(self) -> tuple[object, ...]:
        return self.layers

    @property
    def calling_code(self) -> stock.Stock:
        return self.code

    def course(self) -> Course:
        layers = self.layers
        if None in layers:
            raise RefusedError("it has a layer that is None")
        ends = self.ends_in_layer
        stages = tuple(Stage(str(i), layers[i]) for i in range(1, len(layers) - ends))
        if not stages:
            raise RefusedError("it has no stage")
        last = whole(str(len(layers) - 1), layers[-1]) if ends else None
        return Course((), whole("0", layers[0]), stages, last)


def _parts(model: nn.Module) -> _Parts:
    return _Parts(in_order(model))


def run_planned(model: Any, x: Any) -> Tensor | None:
    """The result of a sequence from packed weights; None where its modules have to run."""
    if torch.is_grad_enabled() or is_training(model) or len(model._modules) < 2:
        return None
    y = plan_of(model).run(model, x, backends.current_backend())
    if isinstance(y, list):
        (y,) = y
        return y
    return None if y is None else in_turn.as_stock(y, x, in_order(model))


class Sequential(layers.Sequential):
    """The `features` of a network.

    Attributes:
        plan: as in `EfficientNet`, which sets it.
    """

    plan = True

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting() or torch.compiler.is_compiling():
            for module in self:
                input = module(input)
            return input
        y = run_planned(self, input)
        return in_turn.run(self, input)[0] if y is None else y


class ForeignFeatures(FusedSequence):
    """In front of the nn.Sequential that is the `features` of another package's network."""

    plan = True

    def forward(self, x: Tensor) -> Any:
        forward: Callable[..., Tensor] = type(self).own.forward
        if forward is type(self).forward_stock and not torch.compiler.is_compiling():
            return self._run(x)
        return forward(self, x)

    def _run(self: Any, x: Tensor) -> Tensor:
        with on_backend(self):
            y = run_planned(self, x)
            return in_turn.run(in_order(self), x)[0] if y is None else y

    @staticmethod
    def enter(fused: type) -> None:
        """Enters a class with this front."""
        parts.enter(fused, lambda model: _Parts(in_order(model), type(model).code), frozenset())


structure.SEQUENCES.add(Sequential)
in_turn.looks_away(Sequential)
parts.enter(Sequential, _parts, frozenset())
