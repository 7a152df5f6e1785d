"""BatchNorm folded into a convolution."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effnet_fast.inference.fold import folded
from effnet_fast.modules import structure
from effnet_fast.modules.layers import Conv2dNormActivation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_rounded_before_the_end(dtype: torch.dtype) -> None:
    """Of parameters in bf16 too: scale and shift come out as exact as fp32 holds them."""
    module = Conv2dNormActivation(4, 8, 1, activation_layer=nn.SiLU).eval()
    for tensor in (*module[1].parameters(), *module[1].buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2.0)
    layer = structure.structure_of(module.to(dtype))
    assert isinstance(layer, structure.Layer)
    bn = module[1]
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    weight, shift = folded(layer)
    exact = module[0].weight.double() * scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(weight.double(), exact, rtol=1e-7, atol=0)
    exact = bn.bias.double() - bn.running_mean.double() * scale
    torch.testing.assert_close(shift.double(), exact, rtol=1e-7, atol=1e-7)
