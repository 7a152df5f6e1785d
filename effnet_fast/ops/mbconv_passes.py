"""The passes of a staged MBConv as registered ops: their schemas and fakes.

What each computes, with its shapes, stands in `effnet_fast.reference.mbconv_passes` under the same
name; `excite` is the op of `squeeze_excite`. An image has its input's dtype and is channels_last
without gaps; vectors and sums are fp32. The CPU's passes are in `mbconv_cpu`; another backend's
launchers bear the ops' names (`mbconv_expand`, ...) in a module of this file's name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effnet_fast.ops.cpu import mbconv
from effnet_fast.ops.dwconv_bn_silu import output_shape
from effnet_fast.ops.registration import empty_nhwc, register
from effnet_fast.ops.squeeze_excite import excite_op
from effnet_fast.reference.mbconv_passes import NORM_ROWS


def _vectors(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _expand_fake(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    channels = weight.shape[0]
    z = empty_nhwc(x, (x.shape[0], channels, *x.shape[2:]))
    return z, _vectors(x, len(NORM_ROWS), channels)


def _depthwise_fake(
    x: Tensor, x_norm: Tensor | None, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    stride, padding = rest[4:6]
    z = empty_nhwc(x, output_shape(x, weight.shape[-1], stride, padding))
    return z, _vectors(x, len(NORM_ROWS), x.shape[1])


def _squeeze_fake(z: Tensor, norm: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _vectors(z, *z.shape[:2]), _vectors(z, 2, *z.shape[:2])


def _project_fake(
    z2: Tensor, norm2: Tensor, gate: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return _expand_fake(z2, weight)


def _finish_fake(z: Tensor, *_: Any) -> Tensor:
    return empty_nhwc(z, z.shape)


def _finish_backward_fake(
    grad_y: Tensor, row_scale: Tensor | None, z: Tensor, norm: Tensor, backend: str
) -> Tensor:
    return _vectors(z, 2, z.shape[1])


def _project_backward_fake(
    grad_y: Tensor,
    row_scale: Tensor | None,
    z3: Tensor,
    norm3: Tensor,
    sums3: Tensor | None,
    weight: Tensor,
    z2: Tensor,
    norm2: Tensor,
    gate: Tensor,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    e, sums = z2.new_empty(0), _vectors(z2, 0)
    if wanted[0]:
        e, sums = empty_nhwc(z2, z2.shape), _vectors(z2, 3, *z2.shape[:2])
    return e, sums, mbconv.empty_weight_grad(z2, weight, wanted[1])


def _excite_backward_fake(
    sums: Tensor, slopes: Tensor, pooled: Tensor, hidden: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    n, e = pooled.shape
    r = hidden.shape[1]
    shapes = ((n, e), (2, e), (r, e), (r,), (e, r), (e,))
    return tuple(_vectors(pooled, *shape) for shape in shapes)


def _depthwise_backward_fake(
    e: Tensor,
    gate: Tensor,
    q: Tensor,
    z2: Tensor,
    norm2: Tensor,
    sums2: Tensor | None,
    x: Tensor,
    x_norm: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: list[int],
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    f = empty_nhwc(x, x.shape) if wanted[0] else x.new_empty(0)
    summed = wanted[0] and x_norm is not None
    sums = _vectors(x, 2, x.shape[1]) if summed else _vectors(x, 0)
    return f, mbconv.empty_weight_grad(x, weight, wanted[1]), sums


def _expand_backward_fake(
    f: Tensor,
    z1: Tensor,
    norm1: Tensor,
    sums1: Tensor | None,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    grad_x = empty_nhwc(x, x.shape) if wanted[0] else x.new_empty(0)
    return grad_x, mbconv.empty_weight_grad(x, weight, wanted[1])


_BN = "Tensor? bn_weight, Tensor? bn_bias, Tensor? mean, Tensor? var"
_SCHEMAS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "expand": (
        f"Tensor x, Tensor weight, {_BN}, float eps",
        "Tensor z, Tensor norm",
        _expand_fake,
    ),
    "depthwise": (
        f"Tensor x, Tensor? x_norm, Tensor weight, {_BN}, int stride, int[4] padding, float eps",
        "Tensor z, Tensor norm",
        _depthwise_fake,
    ),
    "squeeze": ("Tensor z, Tensor norm", "Tensor pooled, Tensor slopes", _squeeze_fake),
    "project": (
        f"Tensor z2, Tensor norm2, Tensor gate, Tensor weight, {_BN}, float eps",
        "Tensor z, Tensor norm",
        _project_fake,
    ),
    "finish": (
        "Tensor z, Tensor norm, Tensor? row_scale, Tensor? residual",
        "Tensor",
        _finish_fake,
    ),
    "finish_backward": (
        "Tensor grad_y, Tensor? row_scale, Tensor z, Tensor norm",
        "Tensor",
        _finish_backward_fake,
    ),
    "project_backward": (
        (
            "Tensor grad_y, Tensor? row_scale, Tensor z3, Tensor norm3, Tensor? sums3, "
            "Tensor weight, Tensor z2, Tensor norm2, Tensor gate, bool[2] wanted"
        ),
        "Tensor e, Tensor sums, Tensor grad_weight",
        _project_backward_fake,
    ),
    "excite_backward": (
        (
            "Tensor sums, Tensor slopes, Tensor pooled, Tensor hidden, Tensor gate, "
            "Tensor reduce_weight, Tensor expand_weight, int pixels"
        ),
        (
            "Tensor q, Tensor sums2, Tensor grad_reduce_weight, Tensor grad_reduce_bias, "
            "Tensor grad_expand_weight, Tensor grad_expand_bias"
        ),
        _excite_backward_fake,
    ),
    "depthwise_backward": (
        (
            "Tensor e, Tensor gate, Tensor q, Tensor z2, Tensor norm2, Tensor? sums2, Tensor x, "
            "Tensor? x_norm, Tensor weight, Tensor? residual, int stride, int[4] padding, "
            "bool[2] wanted"
        ),
        "Tensor f, Tensor grad_weight, Tensor sums",
        _depthwise_backward_fake,
    ),
    "expand_backward": (
        (
            "Tensor f, Tensor z1, Tensor norm1, Tensor? sums1, Tensor x, Tensor weight, "
            "Tensor? residual, bool[2] wanted"
        ),
        "Tensor grad_x, Tensor grad_weight",
        _expand_backward_fake,
    ),
}
OPS = {"excite": excite_op} | {
    name: register(
        f"mbconv_{name}({arguments}, str backend) -> "
        + (f"({results})" if "," in results else results),
        getattr(mbconv, name),
        fake,
    )
    for name, (arguments, results, fake) in _SCHEMAS.items()
}


class Passes:
    """The registered passes on one resolved backend, as `reference.mbconv_staged` calls them."""

    def __init__(self, backend: str) -> None:
        for name, op in OPS.items():
            setattr(self, name, _bound(op, backend))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def _bound(op: Callable[..., Any], backend: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return op(*args, backend)

    return run


@functools.cache
def passes(backend: str) -> Passes:
    """The passes on a resolved backend."""
    return Passes(backend)
