"""The modules that a network hands over, so that its inference can run from packed weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from effnet_fast.modules import structure

# Methods through which a class or an instance could change what forward computes.
METHODS = frozenset({"forward", "forward_features", "forward_head", "_prepared", "_maps"})


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


def is_patched(model: nn.Module) -> bool:
    """Whether the instance has one of METHODS of its own."""
    return not METHODS.isdisjoint(model.__dict__)


def changed_method(model: Any, names: Collection[str] = METHODS) -> str | None:
    """Which of the methods is not that of the class that wrote `inference_parts`, in words.

    A subclass may not override `names`; an instance may patch none of METHODS.
    """
    if is_patched(model):
        return f"its {min(METHODS.intersection(model.__dict__))} is patched"
    kind = type(model)
    own = next(base for base in kind.__mro__ if "inference_parts" in base.__dict__)
    changed = (n for n in names if getattr(kind, n, None) is not getattr(own, n, None))
    name = min(changed, default=None)
    return name and f"it overrides {name}"


def changed_step(model: Any) -> str | None:
    """As `changed_method` for what forward calls; a subclass's forward may call the class's own."""
    return changed_method(model, METHODS - {"forward"})
