"""The activations and gates that the ops know by name, in eager PyTorch and as kernels take them.

Sources: SiLU: Elfwing et al. (arXiv 1702.03118); ReLU6: Sandler et al. (arXiv 1801.04381);
hard-swish and hard-sigmoid: Howard et al. (arXiv 1905.02244), section 5.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

_NONE = float("nan")  # bounds nothing, since a comparison with NaN is false
_SILU, _CLAMP, _HARDSWISH = range(3)  # csrc/common/activation.h


class _Activation(NamedTuple):
    kernel: tuple[int, float, float]  # kind, and the bounds of a clamp
    activate: Callable[[Tensor], Tensor]


# The functions are looked up at each call: the reference is what PyTorch is at that moment.
_ACTIVATIONS = {
    "silu": _Activation((_SILU, _NONE, _NONE), lambda x: F.silu(x)),
    "identity": _Activation((_CLAMP, _NONE, _NONE), lambda x: x),
    "relu": _Activation((_CLAMP, 0.0, _NONE), lambda x: F.relu(x)),
    "relu6": _Activation((_CLAMP, 0.0, 6.0), lambda x: F.relu6(x)),
    "hardswish": _Activation((_HARDSWISH, _NONE, _NONE), lambda x: F.hardswish(x)),
}


def _hardsigmoid(x: Tensor) -> Tensor:
    """F.hardsigmoid, which PyTorch differentiates once alone, and by a sixth rounded to fp32."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (F.relu6(wide + 3) / 6).to(x.dtype)


# Of each gate its kind in csrc/common/activation.h, and its function.
_GATES: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "sigmoid": (0, lambda x: torch.sigmoid(x)),
    "hardsigmoid": (1, _hardsigmoid),
}
ACTIVATIONS = tuple(_ACTIVATIONS)
GATES = tuple(_GATES)


def _check(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_activation(name: str, value: object) -> None:
    """Raises ValueError unless the argument of this name is one of ACTIVATIONS."""
    _check(name, value, ACTIVATIONS)


def check_gate(name: str, value: object) -> None:
    """Raises ValueError unless the argument of this name is one of GATES."""
    _check(name, value, GATES)


def activate(x: Tensor, name: str) -> Tensor:
    """The activation of this name; x itself for "identity"."""
    return _ACTIVATIONS[name].activate(x)


def gate_of(x: Tensor, name: str) -> Tensor:
    """The gate of this name, between 0 and 1."""
    return _GATES[name][1](x)


class _Known(dict[str, Any]):
    """A table whose missing keys are refused as an argument of this name is."""

    def __init__(self, rows: dict[str, Any], check: Callable[[str, object], None], name: str):
        super().__init__(rows)
        self._check, self._name = check, name

    def __missing__(self, key: object) -> NoReturn:
        self._check(self._name, key)
        raise KeyError(key)


# Looked up at each launch, behind the gate that has checked the name: no function of Python's.
kernel_activation: Callable[[str], tuple[int, float, float]] = _Known(
    {name: row.kernel for name, row in _ACTIVATIONS.items()}, check_activation, "activation"
).__getitem__
"""An activation as kernels take it: its kind, and the lower and upper bound of a clamp.

A bound that is NaN bounds nothing. An unknown name is a ValueError, here and below.
"""
kernel_gate: Callable[[str], int] = _Known(
    {name: row[0] for name, row in _GATES.items()}, check_gate, "gate"
).__getitem__
"""A gate as kernels take it, its kind."""
