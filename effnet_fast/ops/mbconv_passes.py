"""The passes of an MBConv in training, `mbconv_training.Passes`, as registered ops with fakes.

`launchers` names what launches them; `excite` is the op of `squeeze_excite`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from effnet_fast.ops.dwconv_bn_silu import output_shape
from effnet_fast.ops.gate import DEPTHWISE, Rules, batch_norm
from effnet_fast.ops.mbconv_training import Passes
from effnet_fast.ops.registration import empty_nhwc, empty_normed, register
from effnet_fast.ops.squeeze_excite import excite_op


def _vectors(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def empty_weight_grad(x: Tensor, weight: Tensor, wanted: bool) -> Tensor:
    """Memory for a weight's gradient, fp32 on x's device; [0] where it is not wanted."""
    return _vectors(x, *(weight.shape if wanted else (0,)))


def _expand_fake(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_normed(x, (x.shape[0], weight.shape[0], *x.shape[2:]))


def _depthwise_fake(
    x: Tensor, x_norm: Tensor | None, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    stride, padding = rest[4:6]
    return empty_normed(x, output_shape(x, weight.shape[-1], stride, padding))


def _squeeze_fake(z: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _vectors(z, *z.shape[:2]), _vectors(z, 2, *z.shape[:2])


def _project_fake(
    z2: Tensor, norm2: Tensor, gate: Tensor | None, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return _expand_fake(z2, weight)


def _finish_fake(z: Tensor, *_: Any) -> Tensor:
    return empty_nhwc(z, z.shape)


def _finish_backward_fake(grad_y: Tensor, row_scale: Any, z: Tensor, *_: Any) -> Tensor:
    return _vectors(z, 2, z.shape[1])


def _project_backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight, z2, _, _, wanted = args[5:10]
    e, sums = z2.new_empty(0), _vectors(z2, 0)
    if wanted[0]:
        e, sums = empty_nhwc(z2, z2.shape), _vectors(z2, 3, *z2.shape[:2])
    return e, sums, empty_weight_grad(z2, weight, wanted[1])


def _excite_backward_fake(
    sums: Tensor, slopes: Tensor, pooled: Tensor, hidden: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    n, channels = pooled.shape
    r = hidden.shape[1]
    shapes = ((n, channels), (2, channels), (r, channels), (r,), (channels, r), (channels,))
    return tuple(_vectors(pooled, *shape) for shape in shapes)


def _depthwise_backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    (x, x_norm, weight), wanted = args[6:9], args[12]
    f = empty_nhwc(x, x.shape) if wanted[0] else x.new_empty(0)
    summed = wanted[0] and x_norm is not None
    sums = _vectors(x, 2, x.shape[1]) if summed else _vectors(x, 0)
    return f, empty_weight_grad(x, weight, wanted[1]), sums


def _expand_backward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    (x, weight), wanted = args[4:6], args[7]
    grad_x = empty_nhwc(x, x.shape) if wanted[0] else x.new_empty(0)
    return grad_x, empty_weight_grad(x, weight, wanted[1])


_PRODUCT = {"x": "image NCHW", "weight": "floats OC11"}
_FILTER = {"x": "image NCHW inner", "x_norm": "fp32? 5C", "weight": "floats C1KK", **DEPTHWISE}
_Z2 = {"z2": "image NCHW nhwc", "norm2": "fp32 5C", "gate": "fp32? NC"}
_ROWS = {"row_scale": "fp32? N"}
_NORMED = {"z": "image NCHW nhwc", "norm": "fp32 5C"}
_WANTED = {"residual": "image? NCHW", "wanted": "flags 2"}

# Of each pass its fake, and what its arguments must be.
_PASSES: dict[Callable[..., Any], tuple[Callable[..., Any], Rules]] = {
    Passes.expand: (_expand_fake, {**_PRODUCT, **batch_norm("O", by_batch=True)}),
    Passes.depthwise: (_depthwise_fake, {**_FILTER, **batch_norm("C", by_batch=True)}),
    Passes.squeeze: (_squeeze_fake, _NORMED),
    Passes.project: (
        _project_fake,
        {**_Z2, "weight": "floats OC11", **batch_norm("O", by_batch=True)},
    ),
    Passes.finish: (_finish_fake, {**_NORMED, **_ROWS, "residual": "image? NCHW"}),
    Passes.finish_backward: (_finish_backward_fake, {"grad_y": "image NCHW", **_ROWS, **_NORMED}),
    Passes.project_backward: (
        _project_backward_fake,
        {
            "grad_y": "image NOHW", **_ROWS, "z3": "image NOHW nhwc", "norm3": "fp32 5O",
            "sums3": "fp32? 2O", "weight": "floats OC11", **_Z2, "wanted": "flags 2",
        },
    ),
    Passes.excite_backward: (
        _excite_backward_fake,
        {
            "sums": "fp32 3NC", "slopes": "fp32 2NC", "pooled": "fp32 NC", "hidden": "fp32 NR",
            "gate": "fp32 NC", "reduce_weight": "floats RC*", "expand_weight": "floats CR*",
            "pixels": "count",
        },
    ),
    Passes.depthwise_backward: (
        _depthwise_backward_fake,
        {
            "e": "image NCPQ nhwc", "gate": "fp32? NC", "q": "fp32? NC with gate",
            "z2": "image NCPQ nhwc", "norm2": "fp32 5C", "sums2": "fp32? 2C", **_FILTER, **_WANTED,
        },
    ),
    Passes.expand_backward: (
        _expand_backward_fake,
        {
            "f": "image NOHW nhwc", "z1": "image NOHW nhwc", "norm1": "fp32 5O",
            "sums1": "fp32? 2O", **_PRODUCT, **_WANTED,
        },
    ),
}  # fmt: skip
_OPS = {
    contract.__name__: register(f"mbconv_{contract.__name__}", fake, rules, contract)
    for contract, (fake, rules) in _PASSES.items()
} | {"excite": excite_op}


class _BoundPasses:  # torch.compile follows a class of one's own, not SimpleNamespace
    def __init__(self, backend: str) -> None:
        for name, op in _OPS.items():
            setattr(self, name, functools.partial(op, backend=backend))


@functools.cache
def passes(backend: str) -> Passes:
    """The passes on a resolved backend: the ops with it as their last argument."""
    return cast(Passes, _BoundPasses(backend))
