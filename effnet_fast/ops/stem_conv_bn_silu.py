"""Dense convolution, BatchNorm and SiLU, or another activation, as one op: the stem.

In eval one kernel. In training the convolution writes its raw output z and yields its statistics,
a second pass writes y; saved for backward are x, z and vectors. Backward is one pass for the sums
of BatchNorm's gradient and one for the weight's gradient, which forms dz as it loads. The gradient
of x is PyTorch's own over dz, which one more pass writes; its last bits may depend on the number of
threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effnet_fast import reference
from effnet_fast.backends import OpArgs, resolve
from effnet_fast.ops import second_derivative
from effnet_fast.ops.call import Call, Norm, call_of
from effnet_fast.ops.dense_conv import convolve_backward
from effnet_fast.ops.gate import CONVOLUTION, batch_norm
from effnet_fast.ops.layout import is_nhwc
from effnet_fast.ops.mbconv_training import normalised_by
from effnet_fast.ops.registration import Ints, autocast, empty_nhwc, empty_normed, nhwc, register
from effnet_fast.ops.statistics import Moves
from effnet_fast.ops.unsaved import keep, save, unpack
from effnet_fast.reference.activations import check_activation
from effnet_fast.reference.arguments import Layer, Padding, Sides
from effnet_fast.reference.stem_conv_bn_silu import check_arguments


def output_shape(x: Tensor, weight: Tensor, stride: Ints, padding: Sides) -> tuple[int, ...]:
    """[N,Cout,Ho,Wo] for x [N,Cin,H,W]; padding is (left, right, top, bottom)."""
    left, right, top, bottom = padding
    return (
        x.shape[0],
        weight.shape[0],
        (x.shape[2] + top + bottom - weight.shape[2]) // stride[0] + 1,
        (x.shape[3] + left + right - weight.shape[3]) // stride[1] + 1,
    )


def empty_eval(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    stride: Ints,
    padding: Sides,
    eps: float,
    activation: str,
    backend: str,
) -> Tensor:
    """y [N,Cout,Ho,Wo], unwritten."""
    return empty_nhwc(x, output_shape(x, weight, stride, padding))


def empty_conv(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    stride: Ints,
    padding: Sides,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """z [N,Cout,Ho,Wo] and its norm [5,Cout], unwritten; by the batch without mean and var."""
    return empty_normed(x, output_shape(x, weight, stride, padding))


def _empty_silu(z: Tensor, norm: Tensor, activation: str, backend: str) -> Tensor:
    return empty_nhwc(z, z.shape)


def empty_sums(grad_y: Tensor, z: Tensor, norm: Tensor, activation: str, backend: str) -> Tensor:
    """sums [2,Cout] of du and of du * zh, unwritten."""
    return z.new_empty((2, z.shape[1]), dtype=torch.float32)


def _empty_dz(
    grad_y: Tensor, z: Tensor, norm: Tensor, sums: Tensor | None, activation: str, backend: str
) -> Tensor:
    return empty_nhwc(z, z.shape)


def empty_weight_grad(
    grad_y: Tensor,
    z: Tensor,
    norm: Tensor,
    sums: Tensor | None,
    x: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Sides,
    activation: str,
    backend: str,
) -> Tensor:
    """The weight's gradient in fp32, unwritten; sums where BatchNorm normalises by the batch."""
    return x.new_empty(weight.shape, dtype=torch.float32)


_CONV = {"x": "image NCHW", "weight": "floats OCKL", **CONVOLUTION}
_NORMED = {"z": "image NCHW", "norm": "fp32 5C"}
eval_op = register("stem_conv_bn_silu_eval", empty_eval, {**_CONV, **batch_norm("O")})
conv_op = register("stem_conv", empty_conv, {**_CONV, **batch_norm("O", by_batch=True)})
silu_op = register("norm_silu", _empty_silu, _NORMED)
sums_op = register("norm_silu_sums", empty_sums, {"grad_y": "image NCHW", **_NORMED})
backward_op = register(
    "norm_silu_backward", _empty_dz, {"grad_y": "image NCHW", **_NORMED, "sums": "fp32? 2C"}
)
weight_backward_op = register(
    "stem_weight_backward",
    empty_weight_grad,
    {
        **_CONV,
        "grad_y": "image NOPQ",
        "z": "image NOPQ",
        "norm": "fp32 5O",
        "sums": "fp32? 2O",
    },
)


def grad_like(grad: Tensor, *tensors: Tensor) -> Tensor:
    """A convolution's gradient in PyTorch's layout of it, by those of the image and the weight."""
    return nhwc(grad) if any(map(is_nhwc, tensors)) else grad.contiguous()


class StemConvBnSilu(torch.autograd.Function):
    """Returns (y, norm); mean and var are None in training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *arguments, move, by = rest
        *layer, activation, backend = arguments
        weight, bn_weight, bn_bias, mean, _, stride, padding, eps = layer
        z, norm = conv_op(x, *layer, backend)
        if by.exchange:
            norm = by.exchange.merge(norm, z, eps, bn_weight, bn_bias)
        if move is not None:
            move(norm)
        save(ctx, x, weight, z, norm, bn_weight)
        keep(ctx, bn_bias)
        ctx.config, ctx.by = (stride, padding, eps, mean is None, activation, backend), by
        ctx.mark_non_differentiable(norm)
        return silu_op(z, norm, activation, backend), norm

    @staticmethod
    @second_derivative.differentiable(second_derivative.stem_conv_bn_silu)
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, z, norm, bn_weight = unpack(ctx)
        (bn_bias,) = ctx.biases
        stride, padding, _, training, activation, backend = ctx.config
        need_x, need_weight, need_gamma, need_beta = ctx.needs_input_grad[:4]
        z, norm, grad_y, sums = nhwc(z), norm.contiguous(), nhwc(grad_y), None
        if need_gamma or need_beta or training:
            sums = sums_op(grad_y, z, norm, activation, backend)
        inner = sums if training else None
        if inner is not None and ctx.by.exchange and (need_x or need_weight):
            inner = ctx.by.exchange.sums(inner, norm)
        grad_x = grad_weight = None
        if need_x:
            dz = backward_op(grad_y, z, norm, inner, activation, backend)
            grad_x = convolve_backward(dz, x, weight, stride, padding, (True, False))[0]
            assert grad_x is not None
            grad_x = grad_like(grad_x, x, weight)
        if need_weight:
            grad_weight = weight_backward_op(
                grad_y, z, norm, inner, x, weight, stride, padding, activation, backend
            ).to(weight.dtype)
            if x.numel():
                grad_weight = grad_like(grad_weight, x, weight)
        return (
            grad_x,
            grad_weight,
            sums[1].to(bn_weight.dtype) if need_gamma and sums is not None else None,
            sums[0].to(bn_bias.dtype) if need_beta and sums is not None else None,
            *(None,) * 9,
        )


def apply(x: Tensor, layer: Layer, call: Call) -> Tensor:
    """The op on checked arguments."""
    (norm,) = call.norms
    rest, last = (call.stride, call.padding, norm.eps), (call.activation, call.backend)
    if call.infers:
        return eval_op(x, *layer, *rest, *last)
    move = Moves((norm, layer, output_shape(x, layer[0], call.stride, call.padding)))
    args = (x, *normalised_by(layer, norm.training), *rest)
    if call.needs_grad:
        y, rows = StemConvBnSilu.apply(*args, *last, move if move.inside else None, norm)
    else:
        z, rows = conv_op(*args, call.backend)
        if norm.exchange:
            rows = norm.exchange.merge(rows, z, norm.eps, *layer[1:3])
        y = silu_op(z, rows, *last)
    move(rows)
    return y


def stem_conv_bn_silu(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    stride: int = 2,
    padding: Padding = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """y = silu(bn(conv(x, weight))), or another activation, in one or two passes over memory.

    Args:
        x: [N,Cin,H,W], fp32 or bf16 (fp16 too on GPUs), any strides: an image needs no copy after
            the loader. Under autocast it is cast as a convolution's input is.
        weight: [Cout,Cin,K,K] in x's dtype or fp32.
        bn_weight, bn_bias: [Cout] in x's dtype or fp32, or None for 1 and 0.
        running_mean, running_var: [Cout], updated in place when training; both may be None then.
        stride: the same in both directions, at least 1.
        padding: None for (K-1)//2, an int, or (left, right, top, bottom).
        training: normalise by the batch's statistics instead of the running ones.
        momentum: share of the new statistics in the running ones.
        eps: added to the variance.
        activation: "silu", "identity", "relu", "relu6" or "hardswish".
        backend: see `effnet_fast.use_backend`; "auto" takes the reference where no kernel fits.

    Returns:
        y [N,Cout,Ho,Wo] in x's dtype, channels_last, Ho = (H + top + bottom - K) // stride + 1.

    Raises:
        TypeError, ValueError: as `effnet_fast.reference.stem_conv_bn_silu`; ValueError for an
            unknown backend too.
        RuntimeError: the backend named by the caller cannot run this call, with the reason.

    Source: Tan & Le (arXiv 1905.11946), table 1; Ioffe & Szegedy (arXiv 1502.03167).
    """
    layer = (weight, bn_weight, bn_bias, running_mean, running_var)
    check_activation("activation", activation)
    sides = check_arguments(x, layer, stride, padding, training)
    x, _ = autocast(x)
    args = OpArgs(x, layer, activations=(activation,))
    chosen = resolve(backend, "stem_conv_bn_silu", args)
    if chosen == "reference":
        return reference.stem_conv_bn_silu(
            x, *layer, stride=stride, padding=sides, training=training, momentum=momentum, eps=eps,
            activation=activation,
        )  # fmt: skip
    norm, geometry = Norm(training, momentum, eps), ((stride, stride), sides)
    tensors = (x, *layer[:3])
    return apply(x, layer, call_of((norm,), tensors, chosen, *geometry, activation=activation))
