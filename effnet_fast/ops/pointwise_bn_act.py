"""1x1 convolution, BatchNorm, SiLU, gate and residual.

The product is torch's own, so that its last bits may depend on the number of threads. In eval the
gate and BN's scale ride on the weight where that is smaller than the image, and BN, SiLU and the
residual are one in-place pass over the product. Nothing is kept between calls, so an edited weight
cannot go stale (docs/decisions/inference.md compares it with a cached folded weight). Training, and
eval with gradients, run the reference composition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effnet_fast import reference
from effnet_fast.backends import OpArgs, native, resolve
from effnet_fast.ops.registration import (
    address,
    autocast,
    empty_nhwc,
    fp32,
    is_bf16,
    isa_of,
    nhwc,
    register,
)
from effnet_fast.reference.pointwise_bn_act import check_arguments


def _rows(x: Tensor) -> Tensor:
    """x [N,C,H,W] in NHWC order as a matrix [N,H*W,C]."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, h * w, c)


def _matrix(x: Tensor) -> Tensor:
    """x [N,C,H,W], NHWC without gaps, as [N * H * W, C]."""
    n, c, h, w = x.shape
    return x.as_strided((n * h * w, c), (c, 1))


def _product(x: Tensor, weight: Tensor, gate: Tensor | None, y: Tensor, backend: str) -> None:
    """Writes conv(x * gate) to y [N,Cout,H,W]; x and y in NHWC order."""
    n, in_channels, h, w = x.shape
    if gate is None:
        matrix = weight if weight.dtype is x.dtype else weight.to(x.dtype)
        matrix = matrix.reshape(-1, in_channels)
        torch.mm(_matrix(x), matrix.t(), out=_matrix(y))
    elif n == 1 and weight.shape[0] <= h * w:  # the weight is smaller than the image
        gated = (weight.reshape(-1, in_channels) * gate.reshape(1, in_channels)).to(x.dtype)
        torch.mm(_matrix(x), gated.t(), out=_matrix(y))
    elif weight.shape[0] <= h * w:
        gated = weight.reshape(1, -1, in_channels) * gate.reshape(n, 1, in_channels)
        torch.bmm(_rows(x), gated.to(x.dtype).transpose(1, 2), out=_rows(y))
    else:
        scaled = empty_nhwc(x, x.shape)
        factors = gate.reshape(n, in_channels).float().contiguous()
        native.load().gate(
            isa_of(backend), n, in_channels, h * w, is_bf16(x), x.data_ptr(),
            factors.data_ptr(), 0, scaled.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        _product(scaled, weight, None, y, backend)


def compute(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bn: Sequence[Tensor | None],
    gate: Tensor | None,
    residual: Tensor | None,
    silu: bool,
    eps: float,
    backend: str,
) -> Tensor:
    """Writes y [N,Cout,H,W], NHWC without gaps, and returns it; bn is weight, bias, mean, var."""
    if y.numel() == 0:
        return y
    _product(nhwc(x), weight, gate, y, backend)
    if residual is not None:
        residual = nhwc(residual.to(x.dtype))
    vectors = [fp32(v) for v in bn]
    native.load().bn_act(
        isa_of(backend), y.numel() // y.shape[1], y.shape[1], is_bf16(y), silu,
        y.data_ptr(), tuple(address(v) for v in vectors), eps, address(residual), y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def _eval_cpu(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gate: Tensor | None,
    residual: Tensor | None,
    silu: bool,
    eps: float,
    backend: str,
) -> Tensor:
    bn = (bn_weight, bn_bias, mean, var)
    return compute(_eval_fake(x, weight), x, weight, bn, gate, residual, silu, eps, backend)


def _eval_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return empty_nhwc(x, (x.shape[0], weight.shape[0], *x.shape[2:]))


eval_op = register("pointwise_bn_act_eval", _eval_cpu, _eval_fake)


def pointwise_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    act: str | None = "silu",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """y = act(bn(conv(x * gate, weight))) + residual.

    Args:
        x: [N,Cin,H,W], fp32 or bf16, channels_last for the "cpu" backend. Under autocast it is cast
            as a convolution's input is.
        weight: [Cout,Cin,1,1] in x's dtype or fp32.
        bn_weight, bn_bias: [Cout] in x's dtype or fp32, or None for 1 and 0.
        running_mean, running_var: [Cout], updated in place when training; both may be None then.
        act: "silu" or None.
        gate: [N,Cin,1,1] or None.
        residual: [N,Cout,H,W] or None.
        training: normalise by the batch's statistics instead of the running ones.
        momentum: share of the new statistics in the running ones.
        eps: added to the variance.
        backend: see `effnet_fast.use_backend`; "auto" takes the reference where no kernel fits,
            and "cpu" has no kernel for training or gradients yet.

    Returns:
        y [N,Cout,H,W] in x's dtype, channels_last.

    Raises:
        TypeError, ValueError: as `effnet_fast.reference.pointwise_bn_act`; ValueError for an
            unknown backend too.
        RuntimeError: the backend named by the caller cannot run this call, with the reason.

    Source: Tan & Le (arXiv 1905.11946), section 4.
    """
    check_arguments(
        x, weight, bn_weight, bn_bias, running_mean, running_var, act, gate, residual, training
    )
    x = autocast(x)
    tensors = (weight, bn_weight, bn_bias, running_mean, running_var, gate, residual)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *tensors)
    )
    inference = not (training or needs_grad)
    chosen = resolve(backend, "pointwise_bn_act", OpArgs(x, tensors, inference=inference))
    if chosen == "reference":
        return reference.pointwise_bn_act(
            x, weight, bn_weight, bn_bias, running_mean, running_var,
            act=act, gate=gate, residual=residual, training=training, momentum=momentum, eps=eps,
        )  # fmt: skip
    return eval_op(
        x, weight, bn_weight, bn_bias, running_mean, running_var,
        gate, residual, act == "silu", eps, chosen,
    )  # fmt: skip
