"""Depthwise convolution, BatchNorm by the batches of several processes, and an activation.

`dwconv_bn_silu` computes the sums of BatchNorm's gradient and uses them in one op. Here other
processes add theirs in between: the passes of an MBConv, which stop there, take its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effnet_fast.backends import backend_of
from effnet_fast.ops import second_derivative
from effnet_fast.ops.call import Call
from effnet_fast.ops.dwconv_bn_silu import output_shape
from effnet_fast.ops.mbconv_passes import passes
from effnet_fast.ops.mbconv_training import inner_sums
from effnet_fast.ops.registration import channels_last, nhwc
from effnet_fast.ops.statistics import Moves
from effnet_fast.ops.stem_conv_bn_silu import silu_op, sums_op
from effnet_fast.ops.unsaved import keep, save, unpack
from effnet_fast.reference.arguments import Layer


def runs_on(backend: str) -> bool:
    """Whether a resolved backend has the passes."""
    return backend_of(backend).launches("mbconv_depthwise")


def _convolve(x: Tensor, layer: Layer, call: Call) -> tuple[Tensor, Tensor]:
    """z [N,C,Ho,Wo], and its norm [5,C] by the values of all processes."""
    (norm,) = call.norms
    z, rows = passes(call.backend).depthwise(
        x, None, layer[0], layer[1], layer[2], None, None,
        call.stride[0], call.padding, norm.eps, call.activation,
    )  # fmt: skip
    assert norm.exchange is not None
    return z, norm.exchange.merge(rows, z, norm.eps, *layer[1:3])


class SyncedDwconvBnSilu(torch.autograd.Function):
    """Returns (y, norm [5,C])."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *layer, call, move = rest
        z, rows = _convolve(x, tuple(layer), call)
        move(rows)
        save(ctx, x, layer[0], layer[1], z, rows)
        keep(ctx, layer[2])
        ctx.call = call
        ctx.mark_non_differentiable(rows)
        return silu_op(z, rows, call.activation, call.backend), rows

    @staticmethod
    @second_derivative.differentiable(second_derivative.synced_dwconv_bn_silu)
    def backward(ctx: Any, grad_y: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
        x, weight, bn_weight, z, rows = unpack(ctx)
        (bn_bias,), call, needs = ctx.biases, ctx.call, ctx.needs_input_grad
        activation, backend, wanted = call.activation, call.backend, list(needs[:2])
        grad_y, z, rows = nhwc(grad_y), nhwc(z), rows.contiguous()
        sums = sums_op(grad_y, z, rows, activation, backend)
        grad_x = grad_weight = None
        if any(wanted):
            inner = inner_sums(call.norms[0], sums, rows, True)
            grad_x, grad_weight, _ = passes(backend).depthwise_backward(
                grad_y, None, None, z, rows, inner, channels_last(x), None, weight, None,
                call.stride[0], call.padding, wanted, activation,
            )  # fmt: skip
        return (
            grad_x if needs[0] else None,
            grad_weight.to(weight.dtype) if needs[1] and grad_weight is not None else None,
            sums[1].to(bn_weight.dtype) if needs[2] else None,
            sums[0].to(bn_bias.dtype) if needs[3] else None,
            *(None,) * 4,
        )


def apply(x: Tensor, layer: Layer, call: Call) -> Tensor:
    """The op on checked arguments, in training; its one norm has an exchange."""
    shape = output_shape(x, layer[0].shape[-1], call.stride[0], call.padding)
    move = Moves((call.norms[0], layer, shape))
    if call.needs_grad:
        y, _ = SyncedDwconvBnSilu.apply(x, *layer, call, move)
        return y
    z, rows = _convolve(x, layer, call)
    move(rows)
    return silu_op(z, rows, call.activation, call.backend)
