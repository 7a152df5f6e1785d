"""Random MBConv blocks for the cases of `cases.py`, and their outputs and gradients by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from activated import SPREAD
from allocations import poisoned
from cases import MBConvCase
from effnet_fast import reference
from effnet_fast.reference.mbconv import (
    ConvParams,
    MBConvConfig,
    MBConvParams,
    SqueezeExciteParams,
    Training,
)
from parity import RUNNING, Dtypes, Results, channels_last, random_like

EPS = (1e-3, 1e-4, 1e-5)
MOMENTUM = (0.1, 0.2, 0.3)
LAYERS = ("expand", "depthwise", "squeeze", "project")


@dataclass(frozen=True)
class BlockCall:
    """One call of mbconv; tensors by "x", "row_scale" and "LAYER.FIELD", None where absent."""

    tensors: dict[str, Tensor | None]
    config: MBConvConfig
    training: Training = True
    memory: str = "fast"

    def with_tensors(self, **tensors: Tensor | None) -> BlockCall:
        """Replaces tensors; "__" stands for the dot."""
        new = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        return replace(self, tensors=self.tensors | new)

    @property
    def x(self) -> Tensor:
        x = self.tensors["x"]
        assert x is not None
        return x

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Names of the tensors that have a gradient."""
        return tuple(
            name
            for name, tensor in self.tensors.items()
            if tensor is not None and not name.endswith(RUNNING) and name != "row_scale"
        )


def block_call(
    case: MBConvCase,
    dtypes: Dtypes,
    training: Training = True,
    *,
    dropped: bool = False,
    padding: Any = None,
    memory: str = "fast",
    seed: int = 0,
    squeeze: bool = True,
    activation: str = "silu",
    se_activation: str = "silu",
    gate: str = "sigmoid",
) -> BlockCall:
    """mbconv on random values; every z has a variance of about 1.

    Args:
        dropped: whether drop-path drops the first image's body and scales the others.
        squeeze: whether it has a squeeze-and-excite.
        activation, se_activation, gate: as `MBConvConfig` has them; what has bounds meets them.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def layer(out: int, inputs: int, kernel: int) -> ConvParams:
        weight = normal(out, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5
        if inputs == 1:  # no weight near 0: a channel of few small ones would have all of the error
            weight = weight.sign() / kernel * (0.5 + torch.rand(weight.shape, generator=generator))
        positive = torch.rand(2, out, generator=generator) + 0.5
        return ConvParams(weight, positive[0], 0.3 * normal(out), 0.3 * normal(out), positive[1])

    def activated(layer: ConvParams) -> ConvParams:
        assert layer.bn_weight is not None
        return layer._replace(bn_weight=layer.bn_weight * SPREAD.get(activation, 1.0))

    wide = SPREAD.get(gate, 1.0)
    expand = activated(layer(case.expanded, case.c, 1)) if case.expanded != case.c else None
    layers: dict[str, Any] = {
        "expand": expand,
        "depthwise": activated(layer(case.expanded, 1, case.k)),
    }
    excite = SqueezeExciteParams(
        normal(case.r, case.expanded, 1, 1) / case.expanded**0.5,
        0.3 * normal(case.r),
        wide * normal(case.expanded, case.r, 1, 1) / case.r**0.5,
        wide * 0.3 * normal(case.expanded),
    )
    layers |= {"squeeze": excite if squeeze else None, "project": layer(case.out, case.expanded, 1)}
    tensors: dict[str, Tensor | None] = {
        "x": channels_last(normal(case.n, case.c, case.h, case.w).to(dtypes.x))
    }
    for name, part in layers.items():
        if part is not None:
            for key, tensor in zip(part._fields, part, strict=True):
                tensors[f"{name}.{key}"] = tensor.to(dtypes.parameters, copy=True)
    row_scale = torch.full((case.n,), 1.25)
    row_scale[:1] = 0.0
    tensors["row_scale"] = row_scale if dropped else None
    kinds = (activation, se_activation, gate)
    config = MBConvConfig(case.stride, padding, case.residual, EPS, MOMENTUM, *kinds)
    return BlockCall(tensors, config, training, memory)


def params_of(tensors: dict[str, Any]) -> MBConvParams:
    """The tensors of a call as the op takes them."""
    kinds = {"squeeze": SqueezeExciteParams}
    parts = {}
    for name in LAYERS:
        kind = kinds.get(name, ConvParams)
        given = f"{name}.{kind._fields[0]}" in tensors
        parts[name] = kind(*(tensors[f"{name}.{f}"] for f in kind._fields)) if given else None
    return MBConvParams(**parts)


def run(
    call: BlockCall,
    function: Callable[..., Tensor] = reference.mbconv,
    *,
    double: bool = False,
    wanted: Sequence[str] | None = None,
    grad_y: Tensor | None = None,
    **options: Any,
) -> Results:
    """Output, gradients and running statistics of one call, an op's under poisoned allocations.

    Args:
        function: `reference.mbconv` or `ops.mbconv`, whose `options` may be `backend`.
        double: compute in float64.
        wanted: tensors whose gradients are asked for, None for all; () runs without autograd.
        grad_y: gradient of the output; None for a fixed random one.
    """
    wanted = call.differentiable if wanted is None else wanted
    tensors = {}
    for name, tensor in call.tensors.items():
        if tensor is not None:
            tensor = tensor.double() if double else tensor.detach()
            tensor = tensor.clone() if name.endswith(RUNNING) else tensor
            tensor = tensor.requires_grad_(name in wanted)
        tensors[name] = tensor
    with poisoned(function is not reference.mbconv):
        with torch.set_grad_enabled(bool(wanted)):
            y = function(
                tensors["x"], params_of(tensors), call.config, training=call.training,
                row_scale=tensors["row_scale"], memory=call.memory, **options,
            )  # fmt: skip
        results = {"y": y.detach()}
        if wanted:
            grad_y = random_like(y) if grad_y is None else grad_y.to(y)
            grads = torch.autograd.grad(y, [tensors[name] for name in wanted], grad_y)
            results |= {f"grad {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return results | {
        name: tensor.detach()
        for name, tensor in tensors.items()
        if tensor is not None and name.endswith(RUNNING)
    }
