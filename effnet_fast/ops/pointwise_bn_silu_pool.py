"""The head: 1x1 convolution, BatchNorm, SiLU or another activation, and the mean over H and W.

In inference on a GPU the map of the convolution's size never reaches memory; the CPU composes what
it has. With gradients or batch statistics the convolution's output z alone is written, by the pass
that expands in an MBConv: the means are a second pass over it, and backward, which needs the
activation's slope at z and one number per image and channel, reads it in the products themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effnet_fast import reference
from effnet_fast.backends import OpArgs, resolve
from effnet_fast.ops import second_derivative
from effnet_fast.ops.call import Call, Norm, call_of
from effnet_fast.ops.gate import batch_norm
from effnet_fast.ops.mbconv_passes import passes
from effnet_fast.ops.mbconv_training import inner_sums, normalised_by
from effnet_fast.ops.registration import autocast, channels_last, dense, empty_nhwc, nhwc, register
from effnet_fast.ops.statistics import Moves
from effnet_fast.ops.unsaved import keep, save, unpack
from effnet_fast.reference.activations import check_activation
from effnet_fast.reference.arguments import Layer
from effnet_fast.reference.pointwise_bn_silu_pool import check_arguments


def _empty_eval(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_PRODUCT = {"x": "image NCHW", "weight": "floats OC11"}
eval_op = register("pointwise_bn_silu_pool_eval", _empty_eval, {**_PRODUCT, **batch_norm("O")})


def empty_grads(
    q: Tensor,
    z: Tensor,
    norm: Tensor,
    sums: Tensor | None,
    x: Tensor,
    weight: Tensor,
    wanted: list[bool],
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, unwritten; [0] for what is not wanted."""
    grad_x = empty_nhwc(x, x.shape) if wanted[0] else x.new_empty(0)
    shape = weight.shape if wanted[1] else (0,)
    return grad_x, x.new_empty(shape, dtype=torch.float32)


# du = q * silu'(u), and dz of it: grad_x = dz weight, grad_weight = dz^T x; see
# `mbconv_training.Passes` for the symbols.
backward_op = register(
    "pointwise_bn_silu_pool_backward",
    empty_grads,
    {
        **_PRODUCT,
        "q": "fp32 NO",
        "z": "image NOHW nhwc",
        "norm": "fp32 5O",
        "sums": "fp32? 2O",
        "wanted": "flags 2",
    },
)


def _forward(
    x: Tensor, layer: Layer, by: Norm, activation: str, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [N,Cout] in x's dtype, and what backward needs: z, norm, slopes."""
    run = passes(backend)
    z, norm = run.expand(x, *normalised_by(layer, by.training), by.eps)
    if by.exchange:
        norm = by.exchange.merge(norm, z, by.eps, *layer[1:3])
    pooled, slopes = run.squeeze(z, norm, activation)
    return pooled.to(x.dtype), z, norm, slopes


def backward_sums(q: Tensor, slopes: Tensor) -> Tensor:
    """sums [2,C] = sum du and sum du * zh, of du = q * silu'(u): no pass over the image.

    q [N,C] is the gradient of y over H * W; slopes [2,N,C] as of `mbconv_training.Passes.squeeze`.
    Added up in float64. An infinite q is nothing to a channel of slope 0 throughout, as a ReLU's.
    """
    is_constant = (slopes == 0).all(0)  # slopes alone may cancel each other
    terms = torch.where(is_constant, 0.0, q.double() * slopes.double())
    return terms.sum(1).to(q.dtype)


class PointwiseBnSiluPool(torch.autograd.Function):
    """Returns (y, norm [5,Cout])."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *layer, by, activation, backend, move = rest
        y, z, norm, slopes = _forward(x, layer, by, activation, backend)
        if move is not None:
            move(norm)
        # No running statistics, which may move before backward: it reads norm.
        save(ctx, x, *layer[:2], z, norm, slopes)
        keep(ctx, layer[2])
        ctx.config = (by, activation, backend)
        ctx.mark_non_differentiable(norm)
        return y, norm

    @staticmethod
    @second_derivative.differentiable(second_derivative.pointwise_bn_silu_pool)
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, bn_weight, z, *vectors = unpack(ctx)
        norm, slopes = (v.contiguous() for v in vectors)  # hooks on saved tensors may change that
        (bn_bias,) = ctx.biases
        by, activation, backend = ctx.config
        needs = ctx.needs_input_grad
        q = dense(grad_y, torch.float32) / (z.shape[2] * z.shape[3])
        sums = backward_sums(q, slopes)
        grads: tuple[Tensor | None, ...] = (None, None)
        if any(needs[:2]):
            inner = inner_sums(by, sums, norm, True)
            grad_x, grad_weight = backward_op(
                q, nhwc(z), norm, inner, channels_last(x), weight,
                list(needs[:2]), activation, backend,
            )  # fmt: skip
            grads = grad_x, grad_weight.to(weight.dtype)
        return (
            grads[0] if needs[0] else None,
            grads[1] if needs[1] else None,
            sums[1].to(bn_weight.dtype) if needs[2] else None,
            sums[0].to(bn_bias.dtype) if needs[3] else None,
            *(None,) * 6,
        )


def apply(x: Tensor, layer: Layer, call: Call) -> Tensor:
    """The op on checked arguments."""
    (norm,) = call.norms
    if call.infers:
        return eval_op(x, *layer, norm.eps, call.activation, call.backend)
    rest = (norm, call.activation, call.backend)
    move = Moves((norm, layer, (x.shape[0], layer[0].shape[0], *x.shape[2:])))
    if call.needs_grad:
        y, rows = PointwiseBnSiluPool.apply(x, *layer, *rest, move if move.inside else None)
    else:
        y, _, rows, _ = _forward(x, layer, *rest)
    move(rows)
    return y


def pointwise_bn_silu_pool(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """y = the mean over H and W of silu(bn(conv(x, weight))), or of another activation.

    With gradients or batch statistics, only the convolution's output is written to memory; it is
    saved for backward with x and vectors.

    Args:
        x: [N,Cin,H,W], fp32 or bf16, channels_last for the "cpu" backend. Under autocast it is cast
            as a convolution's input is.
        weight: [Cout,Cin,1,1] in x's dtype or fp32.
        bn_weight, bn_bias: [Cout] in x's dtype or fp32, or None for 1 and 0.
        running_mean, running_var: [Cout], updated in place when training; both may be None then.
        training: normalise by the batch's statistics instead of the running ones.
        momentum: share of the new statistics in the running ones.
        eps: added to the variance.
        activation: "silu", "identity", "relu", "relu6" or "hardswish".
        backend: see `effnet_fast.use_backend`; "auto" takes the reference where no kernel fits.

    Returns:
        y [N,Cout] in x's dtype.

    Raises:
        TypeError, ValueError: as `effnet_fast.reference.pointwise_bn_silu_pool`; ValueError for an
            unknown backend too.
        RuntimeError: the backend named by the caller cannot run this call, with the reason.

    Source: Tan & Le (arXiv 1905.11946), table 1.
    """
    layer = (weight, bn_weight, bn_bias, running_mean, running_var)
    check_activation("activation", activation)
    check_arguments(x, layer, training)
    x, _ = autocast(x)
    args = OpArgs(x, layer, activations=(activation,))
    chosen = resolve(backend, "pointwise_bn_silu_pool", args)
    if chosen == "reference":
        return reference.pointwise_bn_silu_pool(
            x, *layer, training=training, momentum=momentum, eps=eps, activation=activation
        )
    norm, tensors = Norm(training, momentum, eps), (x, *layer[:3])
    return apply(x, layer, call_of((norm,), tensors, chosen, activation=activation))
