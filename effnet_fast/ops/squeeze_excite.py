"""Squeeze-and-excite as one op: pooled mean, two small layers, gate.

Forward reads x twice, or once where the producer has pooled it already; backward makes one pass for
the gate's gradient and one for grad_x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effnet_fast import reference
from effnet_fast.backends import OpArgs, resolve
from effnet_fast.ops import second_derivative
from effnet_fast.ops.call import wants_gradient
from effnet_fast.ops.registration import empty_nhwc, register
from effnet_fast.ops.unsaved import keep, save, unpack
from effnet_fast.reference.activations import check_activation, check_gate
from effnet_fast.reference.squeeze_excite import check_arguments


def empty_excite(
    pooled: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate_kind: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """hidden [N,R] before its activation and gate [N,C] of pooled [N,C], fp32, unwritten."""
    hidden = pooled.new_empty(pooled.shape[0], reduce_weight.shape[0], dtype=torch.float32)
    return hidden, torch.empty_like(pooled, dtype=torch.float32)


def empty_squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate_kind: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [N,C,H,W], pooled [N,C], hidden [N,R], gate [N,C], unwritten."""
    pooled = x.new_empty(x.shape[:2], dtype=torch.float32)
    hidden = pooled.new_empty(x.shape[0], reduce_weight.shape[0])
    return empty_nhwc(x, x.shape), pooled, hidden, torch.empty_like(pooled)


def empty_grads(
    grad_y: Tensor,
    x: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    gate: Tensor,
    activation: str,
    gate_kind: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, [R,C], [R], [C,R] and [C], unwritten."""
    c, r = pooled.shape[1], hidden.shape[1]
    return (
        empty_nhwc(x, x.shape),
        pooled.new_empty(r, c),
        pooled.new_empty(r),
        pooled.new_empty(c, r),
        pooled.new_empty(c),
    )


_WEIGHTS = {"reduce_weight": "floats RC*", "expand_weight": "floats CR*"}
_LAYERS = {**_WEIGHTS, "reduce_bias": "floats? R", "expand_bias": "floats? C"}
_VECTORS = {"pooled": "fp32 NC", "hidden": "fp32 NR", "gate": "fp32 NC"}
excite_op = register("excite", empty_excite, {"pooled": "fp32 NC", **_LAYERS})
forward_op = register("squeeze_excite", empty_squeeze_excite, {"x": "image NCHW", **_LAYERS})
backward_op = register(
    "squeeze_excite_backward",
    empty_grads,
    {"grad_y": "image NCHW", "x": "image NCHW", **_WEIGHTS, **_VECTORS},
)


class SqueezeExcite(torch.autograd.Function):
    """y = x * gate(x), saving x and vectors over (n, c)."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        y, *vectors = forward_op(*args)
        x, reduce_weight, reduce_bias, expand_weight, expand_bias, *config = args
        ctx.config = tuple(config)  # activation, gate, backend
        save(ctx, x, reduce_weight, expand_weight, *vectors)
        keep(ctx, reduce_bias, expand_bias)
        return y

    @staticmethod
    @second_derivative.differentiable(second_derivative.squeeze_excite)
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, reduce_weight, expand_weight, *vectors = unpack(ctx)
        vectors = [v.contiguous() for v in vectors]  # hooks on saved tensors may change that
        grads = backward_op(grad_y, x, reduce_weight, expand_weight, *vectors, *ctx.config)
        reduce_bias, expand_bias = ctx.biases
        parameters = reduce_weight, reduce_bias, expand_weight, expand_bias
        out: list[Tensor | None] = [grads[0] if ctx.needs_input_grad[0] else None]
        for grad, parameter, need in zip(
            grads[1:], parameters, ctx.needs_input_grad[1:5], strict=True
        ):
            out.append(grad.reshape(parameter.shape).to(parameter.dtype) if need else None)
        return (*out, None, None, None)


def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    *,
    activation: str = "silu",
    gate: str = "sigmoid",
    backend: str = "auto",
) -> Tensor:
    """y = x * sigmoid(expand(silu(reduce(mean of x over H and W)))).

    The mean, the two layers and the gate are computed in fp32 whatever x's dtype.

    Args:
        x: [N,C,H,W], fp32 or bf16, channels_last for the "cpu" backend; H and W at least 1.
        reduce_weight: [R,C,1,1] or [R,C], in x's dtype or fp32, as the other parameters.
        reduce_bias: [R], or None for 0.
        expand_weight: [C,R,1,1] or [C,R].
        expand_bias: [C], or None for 0.
        activation: in the place of SiLU: "silu", "identity", "relu", "relu6" or "hardswish".
        gate: in the place of the sigmoid: "sigmoid" or "hardsigmoid".
        backend: see `effnet_fast.use_backend`; "auto" takes the reference where no kernel fits.

    Returns:
        y [N,C,H,W] in x's dtype, channels_last.

    Raises:
        TypeError, ValueError: as `effnet_fast.reference.squeeze_excite`; ValueError for an unknown
            backend too.
        RuntimeError: the backend named by the caller cannot run this call, with the reason.

    Source: Hu et al. (arXiv 1709.01507), equations 2 to 4.
    """
    parameters = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    check_activation("activation", activation)
    check_gate("gate", gate)
    check_arguments(x, parameters)
    args = OpArgs(x, parameters, activations=(activation,), gate=gate)
    chosen = resolve(backend, "squeeze_excite", args)
    if chosen == "reference":
        return reference.squeeze_excite(x, *parameters, activation=activation, gate=gate)
    if wants_gradient(x, *parameters):
        return SqueezeExcite.apply(x, *parameters, activation, gate, chosen)
    return forward_op(x, *parameters, activation, gate, chosen)[0]
