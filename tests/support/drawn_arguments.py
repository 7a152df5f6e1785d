"""Arguments of a registered op, drawn from the rules that the op declares of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHANNELS = (1, 2, 3, 5, 7, 8, 15, 16, 17, 24, 33)
SIDES = (1, 2, 3, 4, 5, 7, 9)
IMAGE_DTYPES = (torch.float32, torch.bfloat16)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class TensorRule:
    """A tensor's rule in its parts, see csrc/bindings/gate_rules.h."""

    kind: str  # image, floats or fp32
    shape: str
    layout: str = "any"
    optional: bool = False
    partner: str = ""
    ones_follow: bool = False

    @classmethod
    def of(cls, rule: str) -> TensorRule | None:
        """None for the rule of something else."""
        kind, *words = rule.split()
        optional, kind = kind.endswith("?"), kind.rstrip("?")
        if kind not in ("image", "floats", "fp32"):
            return None
        shape, *words = words
        partner = words.pop(words.index("with") + 1) if "with" in words else ""
        layouts = [word for word in words if word != "with"]
        layout = layouts[0] if layouts else ("dense" if kind == "fp32" else "any")
        return cls(kind, shape.rstrip("*"), layout, optional, partner, shape.endswith("*"))


def _laid_out(x: Tensor, layout: str, rng: random.Random) -> Tensor:
    """x in one of the layouts that a rule allows."""
    if layout == "dense" or x.dim() == 0:
        return x.contiguous()
    if layout == "nhwc":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "inner":
        how = rng.choice(("dense", "rows", "channels"))
        if how == "dense":
            return x.contiguous(memory_format=torch.channels_last)
        n, c, h, w = x.shape
        more = (0, 3) if how == "channels" else (1, 0)
        wide = x.new_full((n, h + more[0], w + 2 * more[0], c + more[1]), 7.0)
        part = wide[:, :h, more[0] : w + more[0], :c].permute(0, 3, 1, 2)
        return part.copy_(x)
    how = rng.choice(("dense", "steps", "transposed", "last"))
    if how == "steps":
        return torch.stack([x, x + 1], -1)[..., 0]
    if how == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


class Draw:
    """One call: sizes by letter, and arguments by name that fit the rules."""

    def __init__(self, rules: dict[str, Any], rng: random.Random, backends: tuple[str, ...]):
        self.rules, self.rng, self.backends = rules, rng, backends
        self.dtype = rng.choice(IMAGE_DTYPES)
        self.stride, self.sides = self._geometry()
        self.arguments: dict[str, Any] = {}
        for name, rule in rules.items():
            self.arguments[name] = self._value(name, rule)

    def _geometry(self) -> tuple[tuple[int, int], list[int]]:
        rng = self.rng
        while True:
            self.sizes = {letter: rng.choice(CHANNELS) for letter in "CEOR"}
            self.sizes |= {letter: rng.choice(SIDES) for letter in "HWL"}
            self.sizes |= {"N": rng.choice((0, 1, 1, 2, 3)), "K": rng.choice((1, 3, 3, 5))}
            sizes, stride = self.sizes, (rng.choice((1, 2)),) * 2
            wide = sizes["K"]
            if self.rules.get("weight") == "floats OCKL":
                sizes["K"], wide = rng.choice(SIDES), sizes["L"]
                stride = (rng.choice((1, 2, 3)), rng.choice((1, 2, 3)))
            sides = [rng.choice((0, 0, 1, 2, 3)) for _ in range(4)]
            high = sizes["H"] + sides[2] + sides[3] - sizes["K"]
            wide = sizes["W"] + sides[0] + sides[1] - wide
            if high >= 0 and wide >= 0:
                sizes["P"], sizes["Q"] = high // stride[0] + 1, wide // stride[1] + 1
                break
        self.residual = rng.random() < 0.3 and (sizes["P"], sizes["Q"]) == (sizes["H"], sizes["W"])
        if self.residual:
            sizes["O"] = sizes["C"]
        self.expands, self.excites = rng.random() < 0.6, rng.random() < 0.7
        if not self.expands and "expand" in self.rules:
            sizes["E"] = sizes["C"]
        return stride, sides

    def tensor(self, rule: TensorRule) -> Tensor:
        """A tensor that fits."""
        rng = self.rng
        shape = [self.sizes[s] if s.isalpha() else int(s) for s in rule.shape]
        shape += [1] * (rng.choice((0, 2)) if rule.ones_follow else 0)
        seed = torch.Generator().manual_seed(rng.randrange(1 << 30))
        x = torch.rand(shape, generator=seed) + 0.25
        dtypes = {"image": (self.dtype,), "fp32": (torch.float32,), "floats": FLOATS}
        return _laid_out(x.to(rng.choice(dtypes[rule.kind])), rule.layout, rng)

    def _value(self, name: str, rule: Any) -> Any:
        rng = self.rng
        if isinstance(rule, list):
            if (rule[0] == "?EC" and not self.expands) or (rule[0] == "?EE" and not self.excites):
                return []
            return [self._tensor_or_none(str(r)) for r in rule if r[0] != "?"]
        if TensorRule.of(rule):
            return self._tensor_or_none(rule)
        if name == "backend":
            return rng.choice(self.backends)
        if rule.startswith("name "):
            return rng.choice(rule.split()[1:])
        words = {
            "stride": lambda: self.stride[0],
            "strides": lambda: list(self.stride),
            "sides": lambda: list(self.sides),
            "residual": lambda: self.residual,
            "count": lambda: self.sizes["H"] * self.sizes["W"],
            "flags 2": lambda: [rng.random() < 0.7 for _ in range(2)],
            "flags 3": lambda: (
                [1e-5] * 3 if name == "eps" else [rng.random() < 0.7 for _ in range(3)]
            ),
        }
        others: dict[str, Callable[[], Any]] = {
            "eps": lambda: 1e-5,
            "training": lambda: rng.random() < 0.5,
            "correction": lambda: 1.5,
            "momentum": lambda: 0.25,
        }
        return (words.get(rule) or others[name])()

    def _tensor_or_none(self, text: str) -> Tensor | None:
        rule = TensorRule.of(text)
        assert rule is not None
        if rule.partner and rule.optional and self.arguments.get(rule.partner) is None:
            return None
        if rule.optional and not rule.partner and self.rng.random() < 0.3:
            return None
        return self.tensor(rule)

    def places(self) -> list[tuple[str, int | None, TensorRule]]:
        """Where the tensors are: argument, place in a list, rule."""
        found: list[tuple[str, int | None, TensorRule]] = []
        for name, rule in self.rules.items():
            rows = [r for r in rule if r[0] != "?"] if isinstance(rule, list) else [rule]
            for index, row in enumerate(rows):
                parts = TensorRule.of(row)
                at = index if isinstance(rule, list) else None
                given = parts and self.get(name, at)
                if parts and isinstance(given, Tensor):
                    found.append((name, at, parts))
        return found

    def get(self, name: str, at: int | None) -> Any:
        value = self.arguments[name]
        if at is None:
            return value
        return value[at] if at < len(value) else None

    def put(self, name: str, at: int | None, value: Any) -> None:
        if at is None:
            self.arguments[name] = value
        else:
            self.arguments[name] = [
                *self.arguments[name][:at],
                value,
                *self.arguments[name][at + 1 :],
            ]

    def uses(self, letter: str) -> int:
        """How many of the given tensors have a size of this letter."""
        return sum(rule.shape.count(letter) for *_, rule in self.places())
