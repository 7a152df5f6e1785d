"""Dense convolution, BatchNorm and SiLU as one op: the stem.

In eval one kernel. In training the convolution writes its raw output z and yields its statistics,
a second pass writes y; saved for backward are x, z and vectors. Backward is one pass for the sums
of BatchNorm's gradient and one for the weight's gradient, which forms dz as it loads. The gradient
of x, an image that rarely asks for one, is PyTorch's own; its last bits may depend on the number of
threads.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from effnet_fast import reference
from effnet_fast.backends import OpArgs, is_channels_last, native, resolve
from effnet_fast.ops import second_derivative
from effnet_fast.ops.dwconv_bn_silu import check_values_per_channel
from effnet_fast.ops.norms import MEAN, VAR, empty_norm
from effnet_fast.ops.registration import (
    Ints,
    address,
    autocast,
    empty_nhwc,
    fp32,
    is_bf16,
    isa_of,
    native_weight,
    nhwc,
    register,
)
from effnet_fast.ops.statistics import update_running_statistics
from effnet_fast.reference.arguments import Padding, Sides
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


def _shape(x: Tensor, weight: Tensor, z: Tensor, stride: Ints, padding: Sides) -> tuple[int, ...]:
    """The sizes of a call of a kernel."""
    return (*x.shape, *z.shape[1:], *weight.shape[2:], *stride, padding[0], padding[2])


def _eval_cpu(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    stride: Ints,
    padding: Sides,
    eps: float,
    backend: str,
) -> Tensor:
    y = empty_nhwc(x, output_shape(x, weight, stride, padding))
    if y.numel() == 0:
        return y
    weight = native_weight(weight, x)
    vectors = [fp32(v) for v in (bn_weight, bn_bias, mean, var)]
    native.load().stem_eval(
        isa_of(backend), _shape(x, weight, y, stride, padding), is_bf16(x), is_bf16(weight),
        x.data_ptr(), x.stride(), weight.data_ptr(), tuple(address(v) for v in vectors), eps,
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _eval_fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return empty_nhwc(x, output_shape(x, weight, *rest[4:6]))


def _conv_cpu(
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
    z = empty_nhwc(x, output_shape(x, weight, stride, padding))
    norm = empty_norm(x, z.shape[1])
    if z.numel() == 0:
        return z, norm.zero_()
    weight = native_weight(weight, x)
    vectors = [fp32(v) for v in (bn_weight, bn_bias, mean, var)]
    native.load().stem_conv(
        isa_of(backend), _shape(x, weight, z, stride, padding), is_bf16(x), is_bf16(weight),
        x.data_ptr(), x.stride(), weight.data_ptr(), tuple(address(v) for v in vectors), eps,
        z.data_ptr(), norm.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return z, norm


def _conv_fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    z = empty_nhwc(x, output_shape(x, weight, *rest[4:6]))
    return z, empty_norm(x, z.shape[1])


def _silu_cpu(z: Tensor, norm: Tensor, backend: str) -> Tensor:
    y = empty_nhwc(z, z.shape)
    if y.numel():
        z = nhwc(z)
        native.load().norm_silu(
            isa_of(backend), z.numel() // z.shape[1], z.shape[1], is_bf16(z), z.data_ptr(),
            norm.data_ptr(), y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return y


def _silu_fake(z: Tensor, *_: Any) -> Tensor:
    return empty_nhwc(z, z.shape)


def _sums_cpu(grad_y: Tensor, z: Tensor, norm: Tensor, backend: str) -> Tensor:
    sums = _sums_fake(grad_y, z)
    if z.numel() == 0:
        return sums.zero_()
    grad_y, z = nhwc(grad_y), nhwc(z)
    native.load().norm_silu_sums(
        isa_of(backend), z.numel() // z.shape[1], z.shape[1], is_bf16(z), grad_y.data_ptr(),
        z.data_ptr(), norm.data_ptr(), sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return sums


def _sums_fake(grad_y: Tensor, z: Tensor, *_: Any) -> Tensor:
    return z.new_empty((2, z.shape[1]), dtype=torch.float32)


def _backward_cpu(
    grad_y: Tensor,
    z: Tensor,
    norm: Tensor,
    sums: Tensor | None,
    x: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Sides,
    backend: str,
) -> Tensor:
    grad = x.new_empty(weight.shape, dtype=torch.float32)
    if z.numel() == 0:
        return grad.zero_()
    grad_y, z = nhwc(grad_y), nhwc(z)
    native.load().stem_weight_backward(
        isa_of(backend), _shape(x, weight, z, stride, padding), is_bf16(x), grad_y.data_ptr(),
        z.data_ptr(), norm.data_ptr(), address(sums), x.data_ptr(), x.stride(), grad.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return grad


def _backward_fake(grad_y: Tensor, z: Tensor, *rest: Any) -> Tensor:
    _, _, x, weight = rest[:4]
    return x.new_empty(weight.shape, dtype=torch.float32)


# padding is (left, right, top, bottom); norm [5,Cout] has the rows NORM_ROWS; sums [2,Cout] are
# those of du and of du * zh, None where BatchNorm does not normalise by the batch.
eval_op = register("stem_conv_bn_silu_eval", _eval_cpu, _eval_fake)
conv_op = register("stem_conv", _conv_cpu, _conv_fake)
silu_op = register("norm_silu", _silu_cpu, _silu_fake)
sums_op = register("norm_silu_sums", _sums_cpu, _sums_fake)
weight_backward_op = register("stem_weight_backward", _backward_cpu, _backward_fake)


def _exact_cudnn(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """cuDNN without TF32 and always alike for an x on its devices; a compiler follows no flags."""
    if x.is_cuda and not torch.compiler.is_compiling():
        return torch.backends.cudnn.flags(deterministic=True, allow_tf32=False)
    return contextlib.nullcontext()


def _grad_x(
    grad_y: Tensor,
    z: Tensor,
    norm: Tensor,
    sums: Tensor | None,
    x: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Sides,
) -> Tensor:
    """x's gradient, by PyTorch's own operators over dz written out."""
    scale, shift, mean, rstd, _ = (row.reshape(1, -1, 1, 1) for row in norm)
    u = z * scale + shift
    s = torch.sigmoid(u)
    du = grad_y * (s * (1 + u * (1 - s)))
    if sums is not None:
        means = (sums / max(1, z.numel() // z.shape[1])).reshape(2, 1, -1, 1, 1)
        du = du - means[0] - (z - mean) * rstd * means[1]
    left, right, top, bottom = padding
    n, c, h, w = x.shape
    like = empty_nhwc(x, (n, c, h + top + bottom, w + left + right))  # its values do not matter
    with _exact_cudnn(x):
        grad = torch.ops.aten.convolution_backward(
            (du * scale).to(x.dtype), like, weight.to(x.dtype), None, stride, (0, 0), (1, 1),
            False, (0, 0), 1, (True, False, False),
        )[0]  # fmt: skip
    return nhwc(grad[:, :, top : top + h, left : left + w])


class StemConvBnSilu(torch.autograd.Function):
    """Returns (y, norm); mean and var are None in training."""

    @staticmethod
    def forward(
        ctx: Any,
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
        z, norm = conv_op(x, weight, bn_weight, bn_bias, mean, var, stride, padding, eps, backend)
        ctx.save_for_backward(x, weight, z, norm, bn_weight, bn_bias)
        ctx.config = (stride, padding, eps, mean is None, backend)
        ctx.mark_non_differentiable(norm)
        return silu_op(z, norm, backend), norm

    @staticmethod
    @second_derivative.differentiable(second_derivative.stem_conv_bn_silu)
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, z, norm, bn_weight, bn_bias = ctx.saved_tensors
        stride, padding, _, training, backend = ctx.config
        need_x, need_weight, need_gamma, need_beta = ctx.needs_input_grad[:4]
        z, grad_y, sums = nhwc(z), nhwc(grad_y), None
        if need_gamma or need_beta or training:
            sums = sums_op(grad_y, z, norm, backend)
        inner = sums if training else None
        grad_x = grad_weight = None
        if need_x:
            grad_x = _grad_x(grad_y, z, norm, inner, x, weight, stride, padding)
        if need_weight:
            grad_weight = weight_backward_op(
                grad_y, z, norm, inner, x, weight, stride, padding, backend
            ).to(weight.dtype)
            # PyTorch's layout of it
            if x.numel() and (is_channels_last(x) or is_channels_last(weight)):
                grad_weight = nhwc(grad_weight)
        return (
            grad_x,
            grad_weight,
            sums[1].to(bn_weight.dtype) if need_gamma and sums is not None else None,
            sums[0].to(bn_bias.dtype) if need_beta and sums is not None else None,
            *(None,) * 6,
        )


def apply(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stride: Ints,
    padding: Sides,
    training: bool,
    momentum: float,
    eps: float,
    backend: str,
) -> Tensor:
    """The op on checked arguments and a resolved backend other than the reference."""
    differentiable = (x, weight, bn_weight, bn_bias)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in differentiable
    )
    if not training and not needs_grad:
        return eval_op(
            x, weight, bn_weight, bn_bias, running_mean, running_var, stride, padding, eps, backend
        )
    mean, var = (None, None) if training else (running_mean, running_var)
    args = (x, weight, bn_weight, bn_bias, mean, var, stride, padding, eps, backend)
    if training:
        check_values_per_channel(output_shape(x, weight, stride, padding))
    if needs_grad:
        y, norm = StemConvBnSilu.apply(*args)
    else:
        z, norm = conv_op(*args)
        y = silu_op(z, norm, backend)
    if training:
        count = y.shape[0] * y.shape[2] * y.shape[3]
        update_running_statistics(running_mean, running_var, norm[MEAN], norm[VAR], count, momentum)
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
    backend: str = "auto",
) -> Tensor:
    """y = silu(bn(conv(x, weight))) in one or two passes over memory.

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
        backend: see `effnet_fast.use_backend`; "auto" takes the reference where no kernel fits.

    Returns:
        y [N,Cout,Ho,Wo] in x's dtype, channels_last, Ho = (H + top + bottom - K) // stride + 1.

    Raises:
        TypeError, ValueError: as `effnet_fast.reference.stem_conv_bn_silu`; ValueError for an
            unknown backend too.
        RuntimeError: the backend named by the caller cannot run this call, with the reason.

    Source: Tan & Le (arXiv 1905.11946), table 1; Ioffe & Szegedy (arXiv 1502.03167).
    """
    sides = check_arguments(
        x, weight, bn_weight, bn_bias, running_mean, running_var, stride, padding, training
    )
    x = autocast(x)
    others = (weight, bn_weight, bn_bias, running_mean, running_var)
    chosen = resolve(backend, "stem_conv_bn_silu", OpArgs(x, others))
    if chosen == "reference":
        return reference.stem_conv_bn_silu(
            x, weight, bn_weight, bn_bias, running_mean, running_var,
            stride=stride, padding=sides, training=training, momentum=momentum, eps=eps,
        )  # fmt: skip
    return apply(
        x, weight, bn_weight, bn_bias, running_mean, running_var,
        (stride, stride), sides, training, momentum, eps, chosen,
    )  # fmt: skip
