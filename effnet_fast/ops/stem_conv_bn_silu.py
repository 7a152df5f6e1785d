"""Dense convolution, BatchNorm and SiLU for inference: the stem.

The convolution is torch's own, so that its last bits may depend on the number of threads; BN and
SiLU are one in-place pass over its output. torch pads alike on both sides: for other padding x is
copied, which the few channels of an image make cheap.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native
from .registration import address, fp32, isa_of, nhwc, register


def _convolve(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    left, right, top, bottom = padding
    if (left, top) != (right, bottom):
        x, left, top = F.pad(x, padding), 0, 0
    return nhwc(F.conv2d(x, weight.to(x.dtype), None, stride, (top, left)))


def _eval_cpu(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    stride: list[int],
    padding: list[int],
    eps: float,
    backend: str,
) -> Tensor:
    y = _convolve(x, weight, stride, padding)
    if y.numel() == 0:
        return y
    vectors = [fp32(v) for v in (bn_weight, bn_bias, mean, var)]
    _native.load().bn_act(
        isa_of(backend), y.numel() // y.shape[1], y.shape[1], y.dtype == torch.bfloat16, True,
        y.data_ptr(), tuple(address(v) for v in vectors), eps, 0, y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def _eval_fake(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    stride: list[int],
    padding: list[int],
    eps: float,
    backend: str,
) -> Tensor:
    return _convolve(x, weight, stride, padding)


# padding is (left, right, top, bottom).
eval_op = register(
    "stem_conv_bn_silu_eval(Tensor x, Tensor weight, Tensor? bn_weight, Tensor? bn_bias, "
    "Tensor mean, Tensor var, int[2] stride, int[4] padding, float eps, str backend) -> Tensor",
    _eval_cpu,
    _eval_fake,
)
