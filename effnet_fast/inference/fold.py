"""BatchNorm in eval mode, folded into the convolution before it."""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_fast.modules import structure


def folded(layer: structure.Layer) -> tuple[Tensor, Tensor]:
    """Weight and shift in fp32 with the BatchNorm's running statistics folded in."""
    weight, gamma, beta, mean, var = (
        None if t is None else t.detach().double() for t in layer.tensors
    )
    assert weight is not None
    assert mean is not None
    assert var is not None
    scale = torch.rsqrt(var + layer.bn.eps)
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale
    if beta is not None:
        shift = shift + beta
    return (weight * scale.reshape(-1, 1, 1, 1)).float(), shift.float()
