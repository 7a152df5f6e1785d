"""A dense convolution by PyTorch, with padding on four sides, and the norm of its result.

Where a dense convolution has many input channels, PyTorch's product is the quicker one; the passes
of BatchNorm around it are kernels.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_fast.ops.gate import batch_norm
from effnet_fast.ops.norms import NORM_ROWS
from effnet_fast.ops.registration import Ints, empty_nhwc, nhwc, register
from effnet_fast.reference.arguments import Sides


def empty_norm(
    z: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    """The norm [5,C] of z [N,C,H,W], unwritten; by z's own statistics without mean and var."""
    return z.new_empty((len(NORM_ROWS), z.shape[1]), dtype=torch.float32)


norm_op = register(
    "norm_statistics", empty_norm, {"z": "image NCHW", **batch_norm("C", by_batch=True)}
)


def _sides(padding: Sides) -> tuple[Sides, tuple[int, int]]:
    """What is padded before the convolution, and what (height, width) the convolution pads."""
    left, right, top, bottom = padding
    if (left, top) == (right, bottom):
        return (0, 0, 0, 0), (top, left)
    return padding, (0, 0)


def _exact_cudnn(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """cuDNN without TF32 and always alike for an x on its devices; a compiler follows no flags."""
    if x.is_cuda and not torch.compiler.is_compiling():
        return torch.backends.cudnn.flags(deterministic=True, allow_tf32=False)
    return contextlib.nullcontext()


def convolve(x: Tensor, weight: Tensor, stride: Ints, padding: Sides) -> Tensor:
    """z [N,Cout,Ho,Wo] = conv(x [N,Cin,H,W], weight [Cout,Cin,K,K]), NHWC without gaps."""
    before, pads = _sides(padding)
    x = F.pad(x, before) if any(before) else x
    with _exact_cudnn(x):
        return nhwc(F.conv2d(x, weight.to(x.dtype), None, tuple(stride), pads))


def convolve_backward(
    dz: Tensor, x: Tensor, weight: Tensor, stride: Ints, padding: Sides, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x, NHWC without gaps, and of the weight; None for what is not wanted."""
    before, pads = _sides(padding)
    left, right, top, bottom = before
    n, c, h, w = x.shape
    padded = x
    if any(before):  # the values of x do not matter for its own gradient
        size = (n, c, h + top + bottom, w + left + right)
        padded = F.pad(x, before) if wanted[1] else empty_nhwc(x, size)
    with _exact_cudnn(x):
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            dz, padded, weight.to(x.dtype), None, tuple(stride), pads, (1, 1), False, (0, 0), 1,
            (*wanted, False),
        )  # fmt: skip
    if wanted[0]:
        grad_x = nhwc(grad_x[:, :, top : top + h, left : left + w])
    return grad_x if wanted[0] else None, grad_weight if wanted[1] else None
