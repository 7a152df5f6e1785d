"""Gradient checkpointing: run again in backward instead of keeping activations.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174). What
torch.utils.checkpoint leaves to its caller is done here: the second run takes the backend of the
first, runs every module as the first did (see `repetition`), and moves no running statistics a
second time.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import checkpoint

from effnet_fast import backends
from effnet_fast.locks import ForkLock
from effnet_fast.modules import repetition


@dataclass
class _Moved:
    """The buffers of a BatchNorm that moves copies of them, and how many second runs it is in."""

    buffers: dict[str, Tensor]
    runs: int = 0


# Threads may run one module again at once: the last that ends gives it back its own buffers.
_moved: weakref.WeakKeyDictionary[_BatchNorm, _Moved] = weakref.WeakKeyDictionary()
_lock = ForkLock()


def _move_copies(norm: _BatchNorm) -> None:
    if norm not in _moved:
        _moved[norm] = _Moved(dict(norm.named_buffers(recurse=False)))
        for name, buffer in _moved[norm].buffers.items():
            setattr(norm, name, buffer.clone())
    _moved[norm].runs += 1


def _move_own(norm: _BatchNorm) -> None:
    moved = _moved[norm]
    moved.runs -= 1
    if moved.runs == 0:
        for name, buffer in moved.buffers.items():
            setattr(norm, name, buffer)
        del _moved[norm]


@contextlib.contextmanager
def _second_run(
    module: nn.Module, backend: str, choices: list[repetition.Choice]
) -> Iterator[None]:
    """The first run's backend and choices, and BatchNorms that move copies of their buffers.

    In training they normalise by the batch's statistics; what they move is nobody's concern then.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    with _lock:
        for norm in norms:
            _move_copies(norm)
    try:
        with backends.use_backend(backend), repetition.repeating(choices):
            yield
    finally:
        with _lock:
            for norm in norms:
                _move_own(norm)


class _EverySecondRun(contextlib.AbstractContextManager[None]):
    """`_second_run` anew for each backward: a graph that is retained is run through again."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __enter__(self) -> None:
        self.entered = _second_run(*self.arguments)
        self.entered.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.entered.__exit__(*error)


def _contexts(
    module: nn.Module, backend: str
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    choices: list[repetition.Choice] = []
    return repetition.recording(choices), _EverySecondRun(module, backend, choices)


def run(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Tensor:
    """function(x), which runs `module`, keeping x and the random state alone for backward.

    The second run, in backward, has the same random draws and updates no BatchNorms. What was fused
    in the first is fused again: hooks and modes that have come since do not see it.
    """
    if torch.compiler.is_compiling():  # the compiled backward repeats no update of a buffer
        return checkpoint.checkpoint(function, x, use_reentrant=False)
    contexts = partial(_contexts, module, backends.current_backend())
    return checkpoint.checkpoint(function, x, use_reentrant=False, context_fn=contexts)
