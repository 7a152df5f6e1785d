"""Calls of the ops for tests of activations and gates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effnet_fast.reference.activations import GATES
from parity import Call

INF, NAN = math.inf, math.nan


def kinds_of(call: Call, activation: str) -> list[dict[str, str]]:
    """The activation, with each gate where the op has one."""
    if call.op != "squeeze_excite":
        return [{"activation": activation}]
    return [{"activation": activation, "gate": gate} for gate in GATES]


def _around(bound: float, dtype: torch.dtype) -> list[float]:
    given = torch.tensor([bound], dtype=dtype)
    sides = [torch.nextafter(given, torch.full_like(given, side)) for side in (INF, -INF)]
    return torch.cat([given, *sides]).tolist()


def special(dtype: torch.dtype) -> Tensor:
    """The bounds and their neighbours, both zeros, infinities and NaN, one per image [N,1,1,1].

    Beside 0 normal numbers alone: in bf16 some instructions make subnormal ones 0, stock's too.
    """
    numbers = [x for bound in (6.0, 3.0, -3.0) for x in _around(bound, dtype)]
    small = max(1e-30, torch.finfo(dtype).tiny)
    numbers += [0.0, -0.0, small, -small, INF, -INF, NAN, 100.0, -100.0]
    return torch.tensor(numbers, dtype=dtype).reshape(-1, 1, 1, 1)


def exactly_convolved(call: Call) -> Call:
    """With images and filters of few bits, whose convolution 16 bits hold.

    Of a value that rounding takes across a bound the slope is chance.
    """
    if "weight" not in call.tensors:
        return call
    weight = call.tensors["weight"]
    assert weight is not None
    x = (call.x * 4).round().clamp(-8, 8) / 4
    small = (weight.abs() < 1 / 3).to(weight.dtype)
    return call.with_tensors(x=x, weight=weight.sign() * (1 - small / 2))


def one_pixel(op: str, values: Tensor, activation: str) -> Call:
    """An op whose BatchNorm changes nothing, on images of one pixel of one channel."""
    one, zero = torch.ones(1, dtype=values.dtype), torch.zeros(1, dtype=values.dtype)
    weight = one.reshape(1, 1, 1, 1)
    tensors = {"x": values, "weight": weight, "bn_weight": one, "bn_bias": zero}
    tensors |= {"running_mean": zero, "running_var": one}
    options = {"stride": 1} if op in ("dwconv_bn_silu", "stem_conv_bn_silu") else {}
    return Call(op, tensors, {**options, "eps": 0.0, "activation": activation})
