"""Calls with another activation or gate: many values near its bounds, or all far from them.

A slope that jumps at a bound makes gradients of two correct computations differ where a value is
within rounding of it, in bf16 for one value of some thousands. Where gradients are compared by the
rule of parity all values stay apart from the bounds, on all sides of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Factor of what goes into an activation or a gate with bounds.
SPREAD = {"relu6": 3.0, "hardswish": 2.0, "hardsigmoid": 4.0}
# Values between the bounds and beyond each of them; what goes in stays near one of these.
APART = {
    "relu": (-3.0, 3.0),
    "relu6": (-3.0, 3.0, 9.0),
    "hardswish": (-6.0, 0.0, 6.0),
    "hardsigmoid": (-6.0, 0.0, 6.0),
}
NARROW = 0.3
# Before which of an op's activations and gates its parameters stand.
_BEFORE = {"activation": ("bn_weight", "reduce_weight"), "gate": ("expand_weight",)}


def _apart(weight: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias [C] before an activation or gate, for values apart from its bounds."""
    if kind not in APART:
        return weight, bias
    count = weight.shape[0]
    values = torch.tensor(APART[kind]).repeat(count)[:count]
    return weight * NARROW, values.to(weight.dtype)


def activated(
    tensors: dict[str, Tensor | None],
    options: dict[str, Any],
    kinds: dict[str, str],
    is_apart: bool = False,
) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """Tensors and options of a call with these options "activation" and "gate".

    An op that is called with `act` is given the activation as that.
    """
    if is_apart:
        tensors = dict(tensors)
        for option, kind in kinds.items():
            for name in _BEFORE[option]:
                weight, bias = tensors.get(name), name.replace("weight", "bias")
                if weight is not None:
                    tensors[name], tensors[bias] = _apart(weight, tensors[bias], kind)
        if "act" in options:
            kinds = {"act": kinds["activation"]}
        return tensors, options | kinds
    factors = {
        name: SPREAD.get(value, 1.0) for kind, value in kinds.items() for name in _BEFORE[kind]
    }
    wider = {k: t * factors[k] for k, t in tensors.items() if t is not None and k in factors}
    if "act" in options:
        kinds = {"act": kinds["activation"]}
    return tensors | wider, options | kinds
