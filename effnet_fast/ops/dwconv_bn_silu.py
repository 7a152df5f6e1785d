"""Depthwise convolution, BatchNorm and SiLU, or another activation, as one op.

In eval BN is the epilogue of the convolution, which also yields the mean of y over each image's
pixels, what squeeze-and-excite needs. In training the convolution yields its output's statistics by
tile, a second pass normalises; backward is one pass for the sums and one for both gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effnet_fast import reference
from effnet_fast.backends import OpArgs, resolve
from effnet_fast.ops import second_derivative
from effnet_fast.ops.call import Call, Norm, call_of
from effnet_fast.ops.gate import DEPTHWISE, batch_norm
from effnet_fast.ops.registration import autocast, channels_last, empty_nhwc, nhwc, register
from effnet_fast.ops.statistics import Moves
from effnet_fast.ops.unsaved import keep, save, unpack
from effnet_fast.reference.activations import check_activation
from effnet_fast.reference.arguments import Layer, Padding, Sides
from effnet_fast.reference.dwconv_bn_silu import check_arguments


def output_shape(x: Tensor, kernel: int, stride: int, padding: Sides) -> tuple[int, int, int, int]:
    """[N,C,Ho,Wo] for x [N,C,H,W]."""
    n, c, h, w = x.shape
    left, right, top, bottom = padding
    return (
        n,
        c,
        (h + top + bottom - kernel) // stride + 1,
        (w + left + right - kernel) // stride + 1,
    )


def pixel_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of x [N,C,H,W] over N, H and W."""
    n, _, h, w = x.stride()
    return n, h, w


def empty_eval(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    stride: int,
    padding: Sides,
    eps: float,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y [N,C,Ho,Wo] and its means over the pixels [N,C], unwritten."""
    y = empty_nhwc(x, output_shape(x, weight.shape[-1], stride, padding))
    return y, x.new_empty(x.shape[:2], dtype=torch.float32)


def empty_statistics(
    x: Tensor, weight: Tensor, stride: int, padding: Sides, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution's output z [N,C,Ho,Wo], its mean and biased variance [C], unwritten."""
    z = empty_nhwc(x, output_shape(x, weight.shape[-1], stride, padding))
    mean = x.new_empty(x.shape[1], dtype=torch.float32)
    return z, mean, torch.empty_like(mean)


def _empty_bn_silu(
    z: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    backend: str,
) -> Tensor:
    return empty_nhwc(z, z.shape)


def empty_grads(
    grad_y: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    stride: int,
    padding: Sides,
    eps: float,
    training: bool,
    wanted: list[bool],
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight, BatchNorm's bias and weight [2,C], unwritten; [0] if not wanted."""
    none = x.new_empty(0)
    return (
        empty_nhwc(x, x.shape) if wanted[0] else none,
        x.new_empty(weight.shape, dtype=torch.float32) if wanted[1] else none.clone(),
        x.new_empty((2, x.shape[1]), dtype=torch.float32) if wanted[2] else none.clone(),
    )


_FILTER = {"x": "image NCHW inner", "weight": "floats C1KK", **DEPTHWISE}
eval_op = register("dwconv_bn_silu_eval", empty_eval, {**_FILTER, **batch_norm("C")})
train_op = register("dwconv_statistics", empty_statistics, _FILTER)
bn_silu_op = register("bn_silu", _empty_bn_silu, {"z": "image NCHW", **batch_norm("C")})
backward_op = register(
    "dwconv_bn_silu_backward",
    empty_grads,
    {
        **_FILTER,
        **batch_norm("C"),
        "grad_y": "image NCPQ",
        "z": "image NCPQ nhwc",
        "wanted": "flags 3",
    },
)


class DwconvBnSilu(torch.autograd.Function):
    """Returns (y, mean, var); the latter two are the batch's (training) or those given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        weight, bn_weight, bn_bias, *running, stride, padding = rest[:7]
        training, eps, activation, backend, move = rest[7:]
        z, mean, var = train_op(x, weight, stride, padding, backend)
        if not training:
            mean, var = (statistic.clone() for statistic in running)
        y = bn_silu_op(z, bn_weight, bn_bias, mean, var, eps, activation, backend)
        if move is not None:
            move((mean, var))
        shift = None if bn_bias is None else bn_bias.detach().clone()  # backward reads u
        save(ctx, x, weight, z, bn_weight, shift, mean, var)
        keep(ctx, bn_bias)
        ctx.config = (stride, padding, eps, training, activation, backend)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @second_derivative.differentiable(second_derivative.dwconv_bn_silu)
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, z, bn_weight, shift, mean, var = unpack(ctx)
        stride, padding, eps, training, activation, backend = ctx.config
        need_x, need_weight, need_gamma, need_beta = ctx.needs_input_grad[:4]
        wanted = [need_x, need_weight, need_gamma or need_beta]
        grad_x, grad_weight, sums = backward_op(
            grad_y, channels_last(x), nhwc(z), weight, bn_weight, shift, mean, var,
            stride, padding, eps, training, wanted, activation, backend,
        )  # fmt: skip
        return (
            grad_x if need_x else None,
            grad_weight.to(weight.dtype) if need_weight else None,
            sums[1].to(bn_weight.dtype) if need_gamma else None,
            sums[0].to(shift.dtype) if need_beta else None,
            *(None,) * 9,
        )


def apply(x: Tensor, layer: Layer, call: Call) -> Tensor:
    """The op on checked arguments."""
    (norm,), stride, padding, backend = call.norms, call.stride[0], call.padding, call.backend
    training, eps, activation = norm.training, norm.eps, call.activation
    if call.infers:
        return eval_op(x, *layer, stride, padding, eps, activation, backend)[0]
    move = Moves((norm, layer, output_shape(x, layer[0].shape[-1], stride, padding)))
    if call.needs_grad:
        rest = (stride, padding, training, eps, activation, backend, move if move.inside else None)
        y, mean, var = DwconvBnSilu.apply(x, *layer, *rest)
    else:
        z, mean, var = train_op(x, layer[0], stride, padding, backend)
        y = bn_silu_op(z, *layer[1:3], mean, var, eps, activation, backend)
    move((mean, var))
    return y


def dwconv_bn_silu(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    stride: int = 1,
    padding: Padding = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """y = silu(bn(conv_dw(x, weight))), or another activation, in one or two passes over memory.

    Args:
        x: [N,C,H,W], fp32 or bf16, channels_last (any strides over N, H, W) for the "cpu" backend.
            Under autocast it is cast as a convolution's input is.
        weight: [C,1,K,K], K odd, in x's dtype or fp32.
        bn_weight, bn_bias: [C] in x's dtype or fp32, or None for 1 and 0.
        running_mean, running_var: [C], updated in place when training; both may be None then.
        stride: 1 or 2 (the reference takes more).
        padding: None for (K-1)//2, an int, or (left, right, top, bottom).
        training: normalise by the batch's statistics instead of the running ones.
        momentum: share of the new statistics in the running ones.
        eps: added to the variance.
        activation: "silu", "identity", "relu", "relu6" or "hardswish".
        backend: see `effnet_fast.use_backend`; "auto" takes the reference where no kernel fits.

    Returns:
        y [N,C,Ho,Wo] in x's dtype, channels_last, Ho = (H + top + bottom - K) // stride + 1.

    Raises:
        TypeError, ValueError: as `effnet_fast.reference.dwconv_bn_silu`; ValueError for an unknown
            backend too.
        RuntimeError: the backend named by the caller cannot run this call, with the reason.

    Source: Tan & Le (arXiv 1905.11946), section 4; Ioffe & Szegedy (arXiv 1502.03167).
    """
    layer = (weight, bn_weight, bn_bias, running_mean, running_var)
    check_activation("activation", activation)
    sides = check_arguments(x, layer, stride, padding, training)
    x, _ = autocast(x)
    kernel = (weight.shape[2], weight.shape[3])
    args = OpArgs(x, layer, kernel, stride, activations=(activation,))
    chosen = resolve(backend, "dwconv_bn_silu", args)
    if chosen == "reference":
        return reference.dwconv_bn_silu(
            x, *layer, stride=stride, padding=sides, training=training, momentum=momentum, eps=eps,
            activation=activation,
        )  # fmt: skip
    norm, geometry = Norm(training, momentum, eps), ((stride, stride), sides)
    tensors = (x, *layer[:3])
    return apply(x, layer, call_of((norm,), tensors, chosen, *geometry, activation=activation))
