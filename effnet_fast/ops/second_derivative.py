"""Gradients that can be differentiated again, or come in batches: through the reference.

The fused backward kernels have no derivative and take one gradient at a time. Where backward runs
with create_graph=True, as a gradient penalty has it, or for a batch of gradients, the reference is
run on the saved inputs and differentiated in their stead.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effnet_fast import reference
from effnet_fast.ops.call import Norm
from effnet_fast.ops.layout import is_batched
from effnet_fast.ops.mbconv_training import Saved
from effnet_fast.ops.norms import MEAN, VAR
from effnet_fast.ops.unsaved import unchanged, unpack, unpack_block
from effnet_fast.reference.mbconv import ConvParams, MBConvConfig, MBConvParams, SqueezeExciteParams
from effnet_fast.reference.stem_conv_bn_silu import compose

Inputs = tuple[Tensor | None, ...]
# The saved inputs of an autograd Function, and the op's reference as a function of them.
Again = Callable[[Any], tuple[Inputs, Callable[..., Tensor]]]


def _require_alone(*norms: Norm) -> None:
    """Raises RuntimeError where one normalises by the batches of several processes."""
    if any(norm.exchange for norm in norms):
        raise RuntimeError(
            "SyncBatchNorm has no second derivative over several processes and takes no batch of "
            "gradients: use BatchNorm2d, or backward without create_graph and is_grads_batched"
        )


def synced_dwconv_bn_silu(ctx: Any) -> tuple[Inputs, Callable[..., Tensor]]:
    """Of SyncedDwconvBnSilu, which has none."""
    _require_alone(ctx.call.norms[0])
    raise AssertionError("its norm is always one of several processes")


def dwconv_bn_silu(ctx: Any) -> tuple[Inputs, Callable[..., Tensor]]:
    """`Again` of DwconvBnSilu."""
    x, weight, _, bn_weight, _, mean, var = unpack(ctx)
    stride, padding, eps, training, activation, _ = ctx.config
    running = (None, None) if training else (mean, var)

    def function(*inputs: Any) -> Tensor:
        return reference.dwconv_bn_silu(
            *inputs, *running, stride=stride, padding=padding,
            training=training, eps=eps, activation=activation,
        )  # fmt: skip

    return (x, weight, bn_weight, *unchanged(ctx)), function


def pointwise_bn_silu_pool(ctx: Any) -> tuple[Inputs, Callable[..., Tensor]]:
    """`Again` of PointwiseBnSiluPool."""
    *inputs, _, norm, _ = unpack(ctx)
    by, activation, _ = ctx.config
    _require_alone(by)
    running = (None, None) if by.training else (norm[MEAN], norm[VAR])

    def function(*inputs: Any) -> Tensor:
        return reference.pointwise_bn_silu_pool(
            *inputs, *running, training=by.training, eps=by.eps, activation=activation
        )

    return (*inputs, *unchanged(ctx)), function


def stem_conv_bn_silu(ctx: Any) -> tuple[Inputs, Callable[..., Tensor]]:
    """`Again` of StemConvBnSilu."""
    _require_alone(ctx.by)
    x, weight, _, norm, bn_weight = unpack(ctx)
    stride, padding, eps, training, activation, _ = ctx.config
    running = (None, None) if training else (norm[MEAN], norm[VAR])

    def function(x: Tensor, *layer: Tensor | None) -> Tensor:
        return compose(x, (*layer, *running), stride, padding, training, 0.0, eps, activation)

    return (x, weight, bn_weight, *unchanged(ctx)), function


def squeeze_excite(ctx: Any) -> tuple[Inputs, Callable[..., Tensor]]:
    """`Again` of SqueezeExcite."""
    x, reduce_weight, expand_weight, *_ = unpack(ctx)
    reduce_bias, expand_bias = unchanged(ctx)
    activation, gate, _ = ctx.config
    function = functools.partial(reference.squeeze_excite, activation=activation, gate=gate)
    return (x, reduce_weight, reduce_bias, expand_weight, expand_bias), function


def mbconv(ctx: Any) -> tuple[Inputs, Callable[..., Tensor]]:
    """`Again` of MBConv."""
    _require_alone(*ctx.call.norms)
    unpacked, tensors = unpack_block(ctx, len(Saved._fields), unchanged(ctx))
    saved = Saved(*unpacked)
    call = ctx.call
    modes, eps = zip(*((norm.training, norm.eps) for norm in call.norms), strict=True)
    config = MBConvConfig(
        call.stride[0], call.padding, call.residual, eps,
        activation=call.activation, se_activation=call.se_activation, gate=call.gate,
    )  # fmt: skip

    def layer(tensors: tuple[Any, ...], norm: Tensor | None, training: bool) -> ConvParams:
        # In training the second run must not move the running statistics.
        statistics = (None, None) if training or norm is None else (norm[MEAN], norm[VAR])
        return ConvParams(*tensors[:3], *statistics)

    def function(x: Tensor, *others: Any) -> Tensor:
        tensors = others[3:]
        params = MBConvParams(
            None if tensors[0] is None else layer(tensors[:5], saved.norm1, modes[0]),
            layer(tensors[5:10], saved.norm2, modes[1]),
            None if tensors[10] is None else SqueezeExciteParams(*tensors[10:14]),
            layer(tensors[14:], saved.norm3, modes[2]),
        )
        return reference.mbconv(x, params, config, training=modes, row_scale=saved.row_scale)

    return (saved.x, None, None, None, *tensors), function


def fused_mbconv(ctx: Any) -> tuple[Inputs, Callable[..., Tensor]]:
    """`Again` of FusedMBConv."""
    _require_alone(*ctx.call.norms)
    (x, _, _, norm1, norm3, row_scale), tensors = unpack_block(ctx, 6, unchanged(ctx))
    call, none = ctx.call, (None, None)

    def statistics(norm: Tensor, training: bool) -> tuple[Tensor | None, Tensor | None]:
        return none if training else (norm[MEAN], norm[VAR])

    def function(x: Tensor, *others: Any) -> Tensor:
        dense, project = others[3:6], others[8:11]
        first, last = call.norms[0], call.norms[-1]
        layer: tuple[Any, ...] = (*dense, *statistics(norm1, first.training))
        geometry = call.stride, call.padding
        y = compose(x, layer, *geometry, first.training, 0.0, first.eps, call.activation)
        if norm3 is not None:
            layer = (*project, *statistics(norm3, last.training))
            y = reference.pointwise_bn_act(
                y, *layer, act=None, training=last.training, eps=last.eps
            )
        if row_scale is not None:
            y = y * row_scale.to(y.dtype).reshape(-1, 1, 1, 1)
        return y + x if call.residual else y

    return (x, None, None, None, *tensors[:3], *none, *tensors[3:], *none), function


def differentiable(again: Again) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes an autograd Function's backward differentiable where its gradients are to be.

    torch's own `once_differentiable` treats the gradients as constants, without a word, where the
    gradient of the output requires none.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def checked(ctx: Any, grad_y: Tensor, *others: Any) -> Any:
            if torch.is_grad_enabled() or is_batched(grad_y):
                return _by_reference(ctx, again, grad_y)
            return backward(ctx, grad_y, *others)

        return checked

    return decorate


def _by_reference(ctx: Any, again: Again, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    inputs, function = again(ctx)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: one input may depend on another, and each gradient is the partial one.
        views = [None if t is None else t.view_as(t) for t in inputs]
        y = function(*views)
    pairs = list(itertools.zip_longest(views, ctx.needs_input_grad))
    wanted = [t for t, need in pairs if need and t is not None]
    grads = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=create_graph))
    return tuple(next(grads) if need and t is not None else None for t, need in pairs)
