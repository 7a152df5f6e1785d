"""The modules that a network hands over, so that its inference can run from packed weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn

from effnet_fast.modules import structure

# Methods that forward calls, through which a class or an instance could change what it computes.
STEPS = frozenset({"forward_features", "forward_head", "_prepared", "_maps"})
METHODS = STEPS | {"forward"}
ENTRIES = frozenset({"__call__", "_call_impl"})  # on the way from a call to forward


def in_order(module: nn.Module) -> tuple[Any, ...]:
    """The children as nn.Sequential runs them.

    A child in two places comes twice, and None stands where one was set to None; `children()`
    leaves both out.
    """
    return tuple(module._modules.values())


@dataclass(frozen=True)
class Head:
    """What follows the last stage of a classifier."""

    pool: nn.Module  # makes pooled features [N,C,1,1] of the last convolution's map
    flattens: bool  # whether forward makes [N,C] of what pool gives
    classifier: nn.Module  # makes the network's result of that
    run: Callable[[Tensor], Tensor]  # from the last stage's map to the result


@dataclass(frozen=True)
class InferenceParts:
    """A network's modules in the order in which its forward runs them."""

    features: nn.Module  # children: stem, stages and, in a classifier, the last convolution
    head: Head | None  # what follows features; None in an encoder
    taps: tuple[int, ...]  # the children of features whose maps an encoder gives

    @property
    def layers(self) -> tuple[Any, ...]:
        """Stem, stages and last convolution."""
        return in_order(self.features)

    @property
    def identity(self) -> tuple[object, ...]:
        """What differs where forward runs other modules; without a reference to the network."""
        head = self.head
        rest = () if head is None else (head.pool, head.flattens, head.classifier)
        return (self.features, self.taps, *rest)


def averages_pixels(head: Head) -> bool:
    """Whether pooling is the plain mean over all pixels, [N,C]."""
    try:
        structure.require(head.pool, nn.AdaptiveAvgPool2d)
    except structure.RefusedError:
        return False
    return head.flattens and head.pool.output_size in (1, (1, 1))


def methods_of(kind: type) -> dict[str, Any]:
    """The methods of a class by which forward computes, for `changed_method`."""
    return {name: getattr(kind, name) for name in METHODS | ENTRIES if hasattr(kind, name)}


def is_own(model: Any, name: str) -> bool:
    """Whether what the instance has under the name of a method is its class's, bound to it."""
    method = model.__dict__[name]
    is_bound = isinstance(method, MethodType) and method.__self__ is model
    return is_bound and method.__func__ is getattr(type(model), name)


def changed_method(model: Any, names: frozenset[str] = METHODS | ENTRIES) -> str | None:
    """Which of the methods is not that of the class that wrote `inference_parts`, in words.

    Neither a subclass nor an instance may have another, nor may that class itself by now. A
    `forward` in the instance may be its class's, to which Accelerate's `unwrap_model` sets it.
    """
    state, kind = model.__dict__, type(model)
    if not state.keys().isdisjoint(names):
        for name in sorted(names & state.keys()):
            if name != "forward" or not is_own(model, name):
                return f"its {name} is patched"
    stock = kind._stock_methods
    changed = [name for name in names if getattr(kind, name, None) is not stock.get(name)]
    if not changed:
        return None
    name = min(changed)
    own = next(base for base in kind.__mro__ if "inference_parts" in base.__dict__)
    is_replaced = getattr(own, name, None) is not stock.get(name)
    return f"{own.__name__}.{name} is replaced" if is_replaced else f"it overrides {name}"


def changed_step(model: Any) -> str | None:
    """As `changed_method` for what forward calls.

    A subclass's forward may call the class's own, and so may one that is set on the instance.
    """
    return changed_method(model, STEPS)
