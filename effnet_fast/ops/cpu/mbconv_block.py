"""A whole MBConv in training on the CPU's kernels: the passes of `mbconv_training` in one call.

The call takes tensors that kernels read as they are; it gives None, and has done nothing, for
others, which the registered passes convert or refuse.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.backends import native
from effnet_fast.ops import buffers, scratch
from effnet_fast.ops.call import Call
from effnet_fast.ops.dwconv_bn_silu import output_shape
from effnet_fast.ops.gate import DEPTHWISE, Rules
from effnet_fast.ops.mbconv_training import (
    Grads,
    Layers,
    Needs,
    Saved,
    Vectors,
    pick,
    reach_of,
)
from effnet_fast.ops.registration import empty_nhwc, isa_of
from effnet_fast.ops.statistics import Moves
from effnet_fast.reference.activations import kernel_activation, kernel_gate
from effnet_fast.reference.mbconv import SqueezeExciteParams

_PLACE: Rules = {**DEPTHWISE, "residual": "residual"}
_X: Rules = {"x": "image NCHW nhwc"}
_Z: Rules = {"z1": "image? NEHW nhwc", "z2": "image NEPQ nhwc", "z3": "image NOPQ nhwc"}
_NORMS: Rules = {"norm1": "fp32? 5E", "norm2": "fp32 5E", "norm3": "fp32 5O"}
_VECTORS: Rules = {
    "pooled": "fp32? NE", "slopes": "fp32? 2NE", "hidden": "fp32? NR", "gate": "fp32? NE",
}  # fmt: skip


def _layer(weight: str, *before: str) -> list[str]:
    return [*before, f"native {weight}", *[f"fp32? {weight[0]}"] * 4]


# The order is that of csrc/bindings/block.cpp.
_FORWARD: Rules = {
    **_X,
    "row_scale": "fp32? N",
    "expand": _layer("EC11", "?EC"),
    "depthwise": _layer("E1KK"),
    "excite": ["?EE", "native RE*", "native? R", "native ER*", "native? E"],
    "project": _layer("OE11"),
    **_Z,
    "y": "image NOPQ nhwc",
    **_NORMS,
    **_VECTORS,
    **_PLACE,
}
_BACKWARD: Rules = {
    "grad_y": "image NOPQ nhwc",
    "row_scale": "fp32? N",
    **_X,
    **_Z,
    **_NORMS,
    **_VECTORS,
    "expand": ["?EC", "native EC11", "fp32? E"],
    "depthwise": "native E1KK",
    "excite": ["?EE", "native RE*", "native ER*"],
    "project": "native OE11",
    "grad_x": "image? NCHW nhwc",
    "grad_expand": "fp32? EC11",
    "sums1": "fp32? 2E",
    "grad_depthwise": "fp32? E1KK",
    "sums2": "fp32? 2E",
    "grad_reduce_weight": "fp32? RE*",
    "grad_reduce_bias": "fp32? R",
    "grad_expand_weight": "fp32? ER*",
    "grad_expand_bias": "fp32? E",
    "grad_project": "fp32? OE11",
    "sums3": "fp32 2O",
    "e": "image? NEPQ nhwc",
    "f": "image? NEHW nhwc",
    **_PLACE,
}


_NO_MOVES = (None, None, None)


@functools.cache
def _passes() -> Any:
    rules = dict(_FORWARD), dict(_BACKWARD)
    return native.load().BlockPasses(*rules, Tensor, nn.Parameter)


def _kinds(call: Call) -> tuple[Any, ...]:
    return (
        isa_of(call.backend), kernel_activation(call.activation),
        kernel_activation(call.se_activation), kernel_gate(call.gate), torch.get_num_threads(),
    )  # fmt: skip


def _place(call: Call) -> tuple[Any, ...]:
    return call.stride[0], call.padding, call.residual


def _by_batch(call: Call) -> tuple[bool, ...]:
    return tuple([norm.training for norm in call.norms])


def mbconv_block_forward(
    x: Tensor, row_scale: Tensor | None, layers: Layers, call: Call, move: Moves | None
) -> tuple[Tensor, Saved] | None:
    """As `mbconv_training.forward`; `move` moves the running statistics, too."""
    if any(v is not None and v.dtype is not torch.float32 for v in layers.project[1:]):
        return None  # a network in bf16: its vectors are converted
    excite, (channels, _, _, kernel) = layers.excite, layers.depthwise[0].shape
    size = output_shape(x, kernel, call.stride[0], call.padding)[2:]
    n, shape, out = x.shape[0], (x.shape[0], channels, *size), layers.project[0].shape[0]
    vector = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    z1 = norm1 = pooled = slopes = hidden = gate = None
    if layers.expand is not None:
        z1, norm1 = buffers.empty(x, (n, channels, *x.shape[2:])), vector((5, channels))
    z2, norm2 = buffers.empty(x, shape), vector((5, channels))
    if excite is not None:
        reduced = excite.reduce_weight.shape[0]
        pooled, slopes = vector((n, channels)), vector((2, n, channels))
        hidden, gate = vector((n, reduced)), vector((n, channels))
    z3, norm3 = buffers.empty(x, (n, out, *size)), vector((5, out))
    y = empty_nhwc(x, (n, out, *size))
    given = (
        x, row_scale, layers.expand or (), layers.depthwise, excite or (), layers.project,
        z1, z2, z3, y, norm1, norm2, norm3, pooled, slopes, hidden, gate, *_place(call),
    )  # fmt: skip
    moves, moved = (_NO_MOVES, []) if move is None else move.in_one_call()
    eps = tuple([norm.eps for norm in call.norms])
    if not _passes().forward(given, eps, _by_batch(call), moves, _kinds(call)):
        return None
    if move is not None:
        move.end(moved)
    saved = Saved(x, z1, z2, z3, norm1, norm2, norm3, pooled, slopes, hidden, gate, row_scale)
    return y, saved


def mbconv_block_backward(
    grad_y: Tensor, saved: Saved, layers: Layers, call: Call, needs: Needs
) -> Grads | None:
    """As `mbconv_training.backward`."""
    x, z2, expand, excite = saved.x, saved.z2, layers.expand, layers.excite
    reach = reach_of(needs, layers)
    vector = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    channels, inner = z2.shape[1], (x.shape[0], z2.shape[1], *x.shape[2:])
    grad_expand = sums1 = grad_depthwise = sums2 = e = f = None
    grad_excite: Vectors = (None,) * 4
    if reach.excite:
        e, sums2 = scratch.empty_nhwc("e", z2, z2.shape), vector((2, channels))
        if excite is not None:
            grad_excite = tuple([vector(shape) for shape in _shapes(excite)])
    if needs.depthwise[0]:
        grad_depthwise = vector(layers.depthwise[0].shape)
    if expand is not None and reach.expand:
        f, sums1 = scratch.empty_nhwc("f", x, inner), vector((2, channels))
        grad_expand = vector(expand[0].shape) if needs.expand[0] else None
    grad_x = empty_nhwc(x, x.shape) if needs.x else None
    grad_project = vector(layers.project[0].shape) if needs.project[0] else None
    sums3 = vector((2, saved.z3.shape[1]))
    z1, again = saved.z1, False
    if expand is not None and z1 is None and (f is not None or grad_depthwise is not None):
        z1, again = buffers.empty(x, inner), True
    given = (
        grad_y, saved.row_scale, x, z1, z2, *saved[3:11], (expand or ())[:2], layers.depthwise[0],
        (excite or ())[::2], layers.project[0], grad_x, grad_expand, sums1, grad_depthwise, sums2,
        *grad_excite, grad_project, sums3, e, f, *_place(call),
    )  # fmt: skip
    if not _passes().backward(given, call.norms[0].eps, _by_batch(call), again, _kinds(call)):
        return None
    return Grads(
        grad_x,
        _of_layer(needs.expand, grad_expand, sums1),
        _of_layer(needs.depthwise, grad_depthwise, sums2),
        pick(needs.excite, *grad_excite) if excite is not None else grad_excite,
        _of_layer(needs.project, grad_project, sums3),
    )


def _shapes(excite: SqueezeExciteParams) -> tuple[tuple[int, ...], ...]:
    """Of the gradients of squeeze-and-excite's parameters, whether or not there are biases."""
    first, last = excite.reduce_weight.shape, excite.expand_weight.shape
    return first, first[:1], last, last[:1]


def _of_layer(needs: tuple[bool, ...], weight: Tensor | None, sums: Tensor | None) -> Vectors:
    """The gradients of a layer's weight and of its BatchNorm's weight and bias."""
    if sums is None or not any(needs):
        return (None,) * 3
    bias, scale = sums.unbind()
    return pick(needs, weight, scale, bias)
