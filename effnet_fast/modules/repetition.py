"""What the modules of a first run were run as, for a second run of the same.

Gradient checkpointing runs a module again in backward, and torch.utils.checkpoint wants the same
number of saved tensors then. A hook or a mode that has come or gone since the forward, another
`memory`, or a layer replaced would give the module another way to run.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from effnet_fast.modules.dense_block import DenseBlock, Found
from effnet_fast.modules.structure import Block, FrozenNorm, Layer


class Choice(NamedTuple):
    """How a module was run."""

    module: nn.Module
    found: Found | None  # what the fused ops took it for; None for the stock path
    backend: str  # that ran them


class _Thread(threading.local):
    """Of this thread: where choices are appended, and what is left of a first run's."""

    recorded: list[Choice] | None = None
    repeated: list[Choice] | None = None


thread = _Thread()


@contextlib.contextmanager
def recording(choices: list[Choice]) -> Iterator[None]:
    """Appends the choices of this thread to the list."""
    before = thread.recorded, thread.repeated
    thread.recorded, thread.repeated = choices, None
    try:
        yield
    finally:
        thread.recorded, thread.repeated = before


@contextlib.contextmanager
def repeating(choices: list[Choice]) -> Iterator[None]:
    """Gives the modules of this thread the choices of a first run."""
    before = thread.recorded, thread.repeated
    thread.recorded, thread.repeated = None, [*choices]
    try:
        yield
    finally:
        thread.recorded, thread.repeated = before


def first_choice(module: nn.Module) -> Choice | None:
    """How the first run ran this call of the module; None where it did not.

    A fused layer comes with the running statistics that its BatchNorm has now.
    """
    left = thread.repeated or []
    for place, choice in enumerate(left):
        if choice.module is module:
            del left[place]
            return choice._replace(found=_with_statistics(choice.found))
    return None


def _with_statistics(found: Found | None) -> Found | None:
    """The same with the buffers that its BatchNorms have now, which the second run may move."""
    if isinstance(found, Block):
        expand = found.expand and _layer_with_statistics(found.expand)
        depthwise, project = map(_layer_with_statistics, (found.depthwise, found.project))
        return found._replace(expand=expand, depthwise=depthwise, project=project)
    if isinstance(found, DenseBlock):
        last = found.project and _layer_with_statistics(found.project)
        return found._replace(dense=_layer_with_statistics(found.dense), project=last)
    return found and _layer_with_statistics(found)


def _layer_with_statistics(layer: Layer) -> Layer:
    bn = layer.bn
    if isinstance(bn, FrozenNorm):
        return layer
    return layer._replace(tensors=(*layer.tensors[:3], bn.running_mean, bn.running_var))
