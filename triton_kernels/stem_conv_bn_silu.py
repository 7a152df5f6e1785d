"""The stem for inference: torch's dense convolution, then BatchNorm and SiLU in place.

Computes: y = silu(bn(conv(x, weight)))
Shapes:   x [N,Cin,H,W], weight [Cout,Cin,K,K], y [N,Cout,Ho,Wo]
Dtypes:   x/y fp32|fp16|bf16, weight any, vectors any
Layout:   channels_last
Tiling:   of bn_act.py
Bytes:    the convolution's, and y read and written once more: 3 input channels leave a product
          kernel little to gain over the library's convolution
FLOPs:    2 * K * K * Cin per output
Source:   Tan & Le (arXiv 1905.11946), table 1
Truth:    effnet_fast/ops/stem_conv_bn_silu.py on the cpu backend
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .bn_act import launch_bn_act_fwd
from .folds import launch_norm
from .launching import nhwc


def stem_conv_bn_silu_eval(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    eps: float,
    backend: str,
) -> Tensor:
    """The op of this name."""
    left, right, top, bottom = padding
    if (left, top) != (right, bottom):
        x, left, top = F.pad(x, tuple(padding)), 0, 0
    z = nhwc(F.conv2d(x, weight.to(x.dtype), None, tuple(stride), (top, left)))
    return launch_bn_act_fwd(z, launch_norm(bn_weight, bn_bias, mean, var, eps), True, out=z)
