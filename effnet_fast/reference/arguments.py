"""Checks and conversions of arguments that the reference ops share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Sides = tuple[int, int, int, int]  # left, right, top, bottom
Padding = int | Sides | None
Layer = Sequence[Any]  # weight, bn_weight, bn_bias, mean, var; some None
_BN_VECTORS = ("bn_weight", "bn_bias", "running_mean", "running_var")


def check_tensor(name: str, tensor: object, device: torch.device | None = None) -> None:
    """Raises TypeError unless `tensor` is a floating tensor, ValueError unless on `device`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on the device of x, {device}, got {tensor.device}")


def check_image(x: Tensor) -> None:
    """Raises unless x is a floating-point tensor [N,C,H,W]."""
    check_tensor("x", x)
    if x.dim() != 4:
        raise ValueError(f"x must be [N,C,H,W], got {x.dim()} dimensions: {list(x.shape)}")


def check_shape(name: str, tensor: Tensor, *allowed: tuple[int, ...]) -> None:
    """Raises ValueError unless the tensor's shape is one of `allowed`."""
    if tuple(tensor.shape) not in allowed:
        shapes = " or ".join(str(list(shape)) for shape in allowed)
        raise ValueError(f"{name} must have shape {shapes}, got {list(tensor.shape)}")


def check_batch_norm(
    device: torch.device, channels: int, vectors: Sequence[Tensor | None], training: bool
) -> None:
    """Raises unless the BN vectors are None or [channels], and sufficient for the mode."""
    for name, vector in zip(_BN_VECTORS, vectors, strict=True):
        if vector is not None:
            check_tensor(name, vector, device)
            if vector.shape != (channels,):
                check_shape(name, vector, (channels,))
    _, _, running_mean, running_var = vectors
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be tensors or both be None")
    if running_mean is None and not training:
        raise ValueError("running_mean and running_var may be None only with training=True")


def resolve_padding(padding: Padding, kernel: int) -> tuple[int, int, int, int]:
    """Padding as (left, right, top, bottom); None means (kernel - 1) // 2 on every side.

    Raises:
        TypeError: padding is neither None, an int nor four ints.
        ValueError: a negative amount, or not four of them.
    """
    if padding is None:
        padding = (kernel - 1) // 2
    if isinstance(padding, int) and not isinstance(padding, bool):
        padding = (padding,) * 4
    if not isinstance(padding, (tuple, list)) or any(type(side) is not int for side in padding):
        raise TypeError(
            f"padding must be None, an int or (left, right, top, bottom), got {padding!r}"
        )
    if len(padding) != 4 or min(padding) < 0:
        raise ValueError(
            "padding must be None, an int >= 0 or four of them (left, right, top, bottom), "
            f"got {padding!r}"
        )
    left, right, top, bottom = padding
    return left, right, top, bottom


def check_convolution(
    layer: Layer, x: Tensor, stride: int, padding: Padding, training: bool
) -> Sides:
    """Raises unless the rest fits a weight [Cout,Cin,K,K]; returns the padding of each side."""
    weight, *vectors = layer
    if not isinstance(stride, int) or stride < 1:
        raise ValueError(f"stride must be an int of at least 1, got {stride!r}")
    check_batch_norm(x.device, weight.shape[0], vectors, training)
    kernel = weight.shape[-1]
    left, right, top, bottom = resolve_padding(padding, kernel)
    padded = (x.shape[2] + top + bottom, x.shape[3] + left + right)
    if min(padded) < kernel:
        raise ValueError(
            f"the padded input {list(padded)} is smaller than the {kernel}x{kernel} kernel"
        )
    return left, right, top, bottom


def batch_norm(
    z: Tensor, vectors: Sequence[Tensor | None], training: bool, momentum: float, eps: float
) -> Tensor:
    """F.batch_norm for BN vectors whose dtype may differ from that of z.

    z [N,C,H,W], vectors [C] or None, result in z's dtype. A half-precision z is normalised with
    its own kind of vectors or with fp32 ones (the kernels accumulate in fp32 either way); every
    other mixture is computed with vectors cast to z's dtype, and the statistics cast back.

    Raises:
        ValueError: training with one value per channel.
    """
    given = [v for v in vectors if v is not None]
    half = z.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if half and any(v.dtype != z.dtype for v in given) else z.dtype
    weight, bias, mean, var = (None if v is None else v.to(dtype) for v in vectors)
    y = F.batch_norm(z, mean, var, weight, bias, training, momentum, eps)
    if training and mean is not None and var is not None:
        for stored, updated in zip(vectors[2:], (mean, var), strict=True):
            if stored is not None and stored is not updated:
                stored.copy_(updated)
    return y
