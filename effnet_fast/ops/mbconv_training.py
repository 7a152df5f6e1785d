"""MBConv in training as a sequence of passes: what runs in which order, and what is kept.

The passes are given by the caller: those of `mbconv_passes`, or a backend's of the same names.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from effnet_fast.reference.arguments import Sides
from effnet_fast.reference.mbconv_passes import MEAN, VAR

Vectors = tuple[Tensor | None, ...]


class Passes(Protocol):
    """A namespace with the functions of `mbconv_passes`."""

    def __getattr__(self, name: str) -> Any: ...


class Layers(NamedTuple):
    """expand, depthwise, project: weight, bn_weight, bn_bias, mean, var; expand may be None.

    squeeze: reduce_weight, reduce_bias, expand_weight, expand_bias.
    """

    expand: tuple[Any, ...] | None
    depthwise: tuple[Any, ...]
    squeeze: tuple[Any, ...]
    project: tuple[Any, ...]


class Settings(NamedTuple):
    """eps and training: of the expansion's, the depthwise and the projection's BatchNorm."""

    stride: int
    padding: Sides
    residual: bool
    eps: tuple[float, float, float]
    training: tuple[bool, bool, bool]


class Saved(NamedTuple):
    """What backward needs beside the parameters; z1 is None where it is to be computed again."""

    x: Tensor
    z1: Tensor | None
    z2: Tensor
    z3: Tensor
    norm1: Tensor | None
    norm2: Tensor
    norm3: Tensor
    pooled: Tensor
    slopes: Tensor
    hidden: Tensor
    gate: Tensor
    row_scale: Tensor | None


class Needs(NamedTuple):
    """Which gradients are wanted: of x, and of what `Layers` has, mean and var left out."""

    x: bool
    expand: tuple[bool, bool, bool]
    depthwise: tuple[bool, bool, bool]
    squeeze: tuple[bool, bool, bool, bool]
    project: tuple[bool, bool, bool]


ALL = Needs(True, (True,) * 3, (True,) * 3, (True,) * 4, (True,) * 3)


class Grads(NamedTuple):
    """As `Needs`; None for what is not wanted."""

    x: Tensor | None
    expand: Vectors
    depthwise: Vectors
    squeeze: Vectors
    project: Vectors


def _statistics(layer: tuple[Any, ...], training: bool) -> tuple[Any, Any]:
    return (None, None) if training else (layer[3], layer[4])


def forward(
    passes: Passes, x: Tensor, row_scale: Tensor | None, layers: Layers, settings: Settings
) -> tuple[Tensor, Saved]:
    """y [N,Cout,Ho,Wo] of x [N,Cin,H,W], and what backward needs."""
    stride, padding, residual, eps, training = settings
    z1 = norm1 = None
    h = x
    if layers.expand is not None:
        given = _statistics(layers.expand, training[0])
        h, norm1 = passes.expand(x, *layers.expand[:3], *given, eps[0])
        z1 = h
    given = _statistics(layers.depthwise, training[1])
    z2, norm2 = passes.depthwise(h, norm1, *layers.depthwise[:3], *given, stride, padding, eps[1])
    pooled, slopes = passes.squeeze(z2, norm2)
    hidden, gate = passes.excite(pooled, *layers.squeeze)
    given = _statistics(layers.project, training[2])
    z3, norm3 = passes.project(z2, norm2, gate, *layers.project[:3], *given, eps[2])
    y = passes.finish(z3, norm3, row_scale, x if residual else None)
    saved = Saved(x, z1, z2, z3, norm1, norm2, norm3, pooled, slopes, hidden, gate, row_scale)
    return y, saved


def _pick(needs: tuple[bool, ...], *grads: Tensor | None) -> Vectors:
    return tuple(grad if need else None for need, grad in zip(needs, grads, strict=True))


def backward(
    passes: Passes,
    grad_y: Tensor,
    saved: Saved,
    layers: Layers,
    settings: Settings,
    needs: Needs = ALL,
) -> Grads:
    """The gradients; passes that nothing wanted depends on are left out."""
    stride, padding, residual, eps, training = settings
    x, z1, z2, z3, norm1, norm2, norm3, pooled, slopes, hidden, gate, row_scale = saved
    added = grad_y if residual else None
    to_expand = needs.x or any(needs.expand) if layers.expand is not None else needs.x
    to_depthwise = to_expand or any(needs.depthwise)
    to_squeeze = to_depthwise or any(needs.squeeze)
    expand: Vectors = (None,) * 3
    depthwise: Vectors = (None,) * 3
    squeeze: Vectors = (None,) * 4
    sums3 = passes.finish_backward(grad_y, row_scale, z3, norm3)
    e, sums, grad_weight = passes.project_backward(
        grad_y, row_scale, z3, norm3, sums3 if training[2] else None, layers.project[0],
        z2, norm2, gate, [to_squeeze, needs.project[0]],
    )  # fmt: skip
    project = _pick(needs.project, grad_weight, sums3[1], sums3[0])
    if not to_squeeze:
        return Grads(None, expand, depthwise, squeeze, project)
    q, sums2, *layer_grads = passes.excite_backward(
        sums, slopes, pooled, hidden, gate, layers.squeeze[0], layers.squeeze[2],
        z2.shape[2] * z2.shape[3],
    )  # fmt: skip
    squeeze = _pick(needs.squeeze, *layer_grads)
    if not to_depthwise:
        return Grads(None, expand, depthwise, squeeze, project)
    h = x
    if layers.expand is not None:
        if z1 is None:
            assert norm1 is not None
            statistics = norm1[MEAN], norm1[VAR]
            z1 = passes.expand(x, *layers.expand[:3], *statistics, eps[0])[0]
        h = z1
    f, grad_weight, sums1 = passes.depthwise_backward(
        e, gate, q, z2, norm2, sums2 if training[1] else None, h, norm1, layers.depthwise[0],
        added if layers.expand is None else None, stride, padding,
        [to_expand, needs.depthwise[0]],
    )  # fmt: skip
    depthwise = _pick(needs.depthwise, grad_weight, sums2[1], sums2[0])
    if layers.expand is None or not to_expand:
        return Grads(f if needs.x else None, expand, depthwise, squeeze, project)
    grad_x, grad_weight = passes.expand_backward(
        f, z1, norm1, sums1 if training[0] else None, x, layers.expand[0], added,
        [needs.x, needs.expand[0]],
    )  # fmt: skip
    expand = _pick(needs.expand, grad_weight, sums1[1], sums1[0])
    return Grads(grad_x if needs.x else None, expand, depthwise, squeeze, project)
