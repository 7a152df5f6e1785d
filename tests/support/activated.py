"""Calls with another activation or gate, whose bounds many values meet, and slopes there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effnet_fast.reference.activations import activate

# Factor of what goes into an activation or a gate with bounds.
SPREAD = {"relu6": 3.0, "hardswish": 2.0, "hardsigmoid": 4.0}
# Before which of an op's activations and gates its parameters stand.
_BEFORE = {"activation": ("bn_weight", "reduce_weight"), "gate": ("expand_weight",)}


def activated(
    tensors: dict[str, Tensor | None], options: dict[str, Any], kinds: dict[str, str]
) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """Tensors and options of a call with these options "activation" and "gate".

    An op that is called with `act` is given the activation as that.
    """
    factors = {
        name: SPREAD.get(value, 1.0) for kind, value in kinds.items() for name in _BEFORE[kind]
    }
    wider = {k: t * factors[k] for k, t in tensors.items() if t is not None and k in factors}
    if "act" in options:
        kinds = {"act": kinds["activation"]}
    return tensors | wider, options | kinds


def slope_of(u: Tensor, activation: str) -> Tensor:
    """The derivative of an activation at u, as PyTorch has it."""
    u = u.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(activate(u, activation).sum(), u)
    return slope
