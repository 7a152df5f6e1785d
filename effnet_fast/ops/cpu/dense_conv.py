"""The norm of a dense convolution's result on the CPU's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effnet_fast.backends import native
from effnet_fast.ops.dense_conv import empty_norm
from effnet_fast.ops.registration import BF16, isa_of, native_vectors, nhwc


def norm_statistics(z: Tensor, *rest: Any) -> Tensor:
    """The registered op."""
    *bn, eps, backend = rest
    norm = empty_norm(z, *rest)
    if z.numel() == 0:
        return norm.zero_()
    (n, c, h, w), z = z.shape, nhwc(z)
    _kept, vectors = native_vectors(bn)
    native.load().norm_statistics(
        isa_of(backend), (n, h * w, c), z.dtype is BF16, z.data_ptr(), vectors, eps,
        norm.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return norm
