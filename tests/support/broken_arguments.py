"""What a caller can do to an argument of an op, and whether the op may still take it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from drawn_arguments import Draw, TensorRule
from effnet_fast.ops.gate import NAMES

FAKE = FakeTensorMode()
# REFUSED: the call must raise. SAME: it raises, or gives what clean arguments give.
REFUSED, SAME = "refused", "same"
Break = Callable[[Draw, Tensor, TensorRule, random.Random], "tuple[Any, str] | None"]
BREAKS: dict[str, Break] = {}  # of a tensor: the other one and the verdict, None where it cannot be
SCALARS: dict[str, dict[str, tuple[Any, ...]]] = {
    "stride": {"stride": (0, -1, 3, 1 << 40)},
    "strides": {"strides": ([0, 1], [1], [1, 1, 1], [-1, 1], [1, 1 << 40])},
    "sides": {"sides": ([-1, 0, 0, 0], [0, 0, 0, -9], [1 << 40] * 4)},
    "flags": {"flags 2": ([], [True]), "flags 3": ([], [True, True])},
    "count": {"count": (-1, -(1 << 40))},
    "name": dict.fromkeys(NAMES.values(), ("tanh", "", "SiLU", "silu ", "sigmoid6")),
    "backend": {"any": ("auto", "reference", "cpu:mips", "", "cuda", "CPU")},
}


class Plain(torch.Tensor):
    """A subclass with memory of its own."""


def breaks(function: Break) -> Break:
    BREAKS[function.__name__.strip("_")] = function
    return function


def _simple(name: str, verdict: str, make: Callable[[Tensor], Any]) -> None:
    BREAKS[name] = lambda draw, x, rule, rng: (make(x), verdict)


def _freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def _fake(x: Tensor) -> Any:
    return FAKE.from_tensor(x)


def _functional(x: Tensor) -> Any:
    untyped: Any = torch
    return untyped._to_functional_tensor(x)


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


_simple("int", REFUSED, lambda x: x.int())
_simple("bool", REFUSED, lambda x: x.bool())
_simple("complex", REFUSED, lambda x: x.to(torch.complex64).conj())
_simple("no_dims", REFUSED, lambda x: x.sum())
_simple("empty_list_like", REFUSED, lambda x: x.new_empty((0,) * (x.dim() + 1)))
_simple("meta", SAME, lambda x: x.to("meta"))
_simple("fake", SAME, _fake)
_simple("functional", SAME, _functional)
_simple("sparse", REFUSED, lambda x: x.float().to_sparse())
_simple("mkldnn", REFUSED, lambda x: x.float().contiguous().to_mkldnn())
_simple("nested", REFUSED, lambda x: torch.nested.nested_tensor([x.flatten()]))
_simple("quantized", REFUSED, lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8))
_simple("subclass", REFUSED, lambda x: x.as_subclass(Plain))
_simple("masked", REFUSED, lambda x: torch.masked.masked_tensor(x.float(), x > 0))
_simple("zeros", SAME, lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype))
_simple("negative_bit", SAME, lambda x: torch._neg_view(-x))
_simple("gradient", SAME, lambda x: x.detach().requires_grad_())
_simple("parameter", SAME, lambda x: torch.nn.Parameter(x.detach()))
_simple("inference", SAME, _inference)
_simple("string", REFUSED, lambda x: "tensor")


@breaks
def _more_dims(draw: Draw, x: Tensor, rule: TensorRule, rng: random.Random) -> Any:
    fits = rule.ones_follow and x.numel() == 1
    return x[None, None, None], SAME if fits else REFUSED


@breaks
def _freed_storage(draw: Draw, x: Tensor, rule: TensorRule, rng: random.Random) -> Any:
    return (_freed(x), REFUSED) if x.numel() else None


@breaks
def _other_dtype(draw: Draw, x: Tensor, rule: TensorRule, rng: random.Random) -> Any:
    dtype = rng.choice([torch.float64, torch.float16, torch.bfloat16, torch.float32])
    if dtype is x.dtype:
        return None
    images = sum(other.kind == "image" for *_, other in draw.places())
    unknown = rule.kind == "image" and dtype in (torch.float64, torch.float16)
    mixed = rule.kind == "image" and images > 1
    return x.to(dtype), REFUSED if unknown or mixed or rule.kind == "fp32" else SAME


@breaks
def _other_size(draw: Draw, x: Tensor, rule: TensorRule, rng: random.Random) -> Any:
    at = rng.randrange(len(rule.shape))
    size = rng.choice([0, 1, x.shape[at] + 1, max(x.shape[at] - 1, 0), 2 * x.shape[at] + 3])
    if size == x.shape[at]:
        return None
    letter = rule.shape[at]
    shape = list(x.shape)
    shape[at] = size
    alone = letter.isalpha() and (draw.uses(letter) == 1 or letter in "HWKLPQ")
    other = torch.rand(shape).to(x.dtype)
    if rule.layout in ("nhwc", "inner"):
        other = other.contiguous(memory_format=torch.channels_last)
    return other, SAME if alone else REFUSED


@breaks
def _none(draw: Draw, x: Tensor, rule: TensorRule, rng: random.Random) -> Any:
    return None if rule.optional else (Ellipsis, REFUSED)  # Ellipsis stands for None


@breaks
def _half_a_pair(draw: Draw, x: Tensor, rule: TensorRule, rng: random.Random) -> Any:
    return (Ellipsis, REFUSED) if rule.partner and rule.optional else None


@breaks
def _other_layout(draw: Draw, x: Tensor, rule: TensorRule, rng: random.Random) -> Any:
    if x.dim() < 2:
        return torch.stack([x, x], -1)[..., 0], SAME
    wide = torch.stack([x, x + 1], rng.choice([-1, x.dim() // 2]))
    odd = [x.contiguous(), wide.select(-1, 0) if wide.shape[-1] == 2 else x, x.mT.contiguous().mT]
    return rng.choice(odd), SAME


@breaks
def _expanded(draw: Draw, x: Tensor, rule: TensorRule, rng: random.Random) -> Any:
    at = rng.randrange(x.dim())
    return x.narrow(at, 0, min(x.shape[at], 1)).expand(x.shape) if x.shape[at] else x, SAME


@breaks
def _overlapping(draw: Draw, x: Tensor, rule: TensorRule, rng: random.Random) -> Any:
    memory = torch.rand(2 * sum(x.shape) + 1).to(x.dtype)
    return memory.as_strided(x.shape, [rng.choice([0, 1, 1, 2]) for _ in x.shape]), SAME


@breaks
def _huge_strides(draw: Draw, x: Tensor, rule: TensorRule, rng: random.Random) -> Any:
    given = zip(x.shape, x.stride(), strict=True)
    strides = [1 << 61 if size == 1 else stride for size, stride in given]
    return x.as_strided(x.shape, strides), SAME


@breaks
def _huge_size(draw: Draw, x: Tensor, rule: TensorRule, rng: random.Random) -> Any:
    if rule.kind != "image" or not x.numel():
        return None
    shape = list(x.shape)
    at = rng.choice([0, 2, 3])
    shape[at] = rng.choice([1 << 40, 1 << 50])
    return x.narrow(at, 0, 1).expand(shape), SAME


@breaks
def _misaligned(draw: Draw, x: Tensor, rule: TensorRule, rng: random.Random) -> Any:
    memory = x.new_empty(x.untyped_storage().nbytes() // x.element_size() + 1)
    return memory.as_strided(x.shape, x.stride(), 1).copy_(x) if x.numel() else x, SAME


def break_one(draw: Draw, rng: random.Random) -> tuple[str, str] | None:
    """Breaks one argument of a draw; what was done, and the verdict; None where nothing was."""
    places = draw.places()
    if places and rng.random() < 0.85:
        name, at, rule = rng.choice(places)
        kind = rng.choice(list(BREAKS))
        found = BREAKS[kind](draw, draw.get(name, at), rule, rng)
        if found is None:
            return None
        other, verdict = found
        draw.put(name, at, None if other is Ellipsis else other)
        return f"{name} {kind}", verdict
    if places and rng.random() < 0.4:
        (one, at, _), (two, to, _) = rng.choice(places), rng.choice(places)
        a, b = draw.get(one, at), draw.get(two, to)
        draw.put(one, at, b)
        draw.put(two, to, a)
        return f"{one} and {two} swapped", SAME
    name, rule = rng.choice(list(draw.rules.items()))
    if isinstance(rule, list) and draw.arguments[name]:
        given = draw.arguments[name]
        draw.arguments[name] = rng.choice([given[:-1], [*given, given[0]]])
        return f"{name} of another length", REFUSED
    for kind, values in SCALARS.items():
        if str(rule) in values and (kind != "backend" or name == "backend"):
            draw.arguments[name] = rng.choice(values[str(rule)])
            return f"{name} {draw.arguments[name]}", REFUSED
    return None
