"""A model under edit, from which the kinds of edit draw what they change."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

from torch import nn

from effnet_fast.modules import layers

Kind = Callable[["Session"], object]


class Session:
    """A model under edit.

    Attributes:
        model: the network.
        draw: of this sequence of edits.
        stack: undoes what reaches beyond the model.
        autocast: whether calls run under bf16 autocast.
    """

    def __init__(self, model: Any, draw: random.Random, stack: contextlib.ExitStack) -> None:
        self.model, self.draw, self.stack = model, draw, stack
        self.autocast = False

    def factor(self) -> float:
        return self.draw.choice((0.5, 0.8, 1.25, 1.5))

    def one(self, *kinds: type) -> Any:
        """A module of one of these classes (of subclasses too), anywhere; LookupError for none."""
        found = [m for m in self.model.modules() if isinstance(m, kinds)]
        if not found:
            raise LookupError(kinds)
        return self.draw.choice(found)

    def layer(self) -> Any:
        """A whole layer: convolution, norm and perhaps activation."""
        found = [m for m in self.model.modules() if type(m) is layers.Conv2dNormActivation]
        found = [m for m in found if len(m) > 1]
        if not found:
            raise LookupError("layer")
        return self.draw.choice(found)

    def parameter(self) -> tuple[nn.Module, str]:
        """A parameter with more than no value: its module and name."""
        found = [
            (module, name)
            for module in self.model.modules()
            for name, tensor in module._parameters.items()
            if tensor is not None and tensor.numel()
        ]
        return self.draw.choice(found)

    def statistic(self) -> tuple[nn.Module, str]:
        norm = self.one(nn.BatchNorm2d)
        return norm, self.draw.choice(("running_mean", "running_var"))

    def patch(self, owner: Any, name: str, value: object) -> None:
        """Sets an attribute of a class or a module until the sequence ends."""
        own = vars(owner).get(name, self)
        if own is self:  # inherited
            self.stack.callback(lambda: name in vars(owner) and delattr(owner, name))
        else:
            self.stack.callback(setattr, owner, name, own)
        setattr(owner, name, value)
