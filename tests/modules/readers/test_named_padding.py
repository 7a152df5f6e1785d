"""Convolutions whose padding has a name, "valid" or "same", in this package's own modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from effnet_fast import use_backend
from effnet_fast.modules import structure
from effnet_fast.modules.explain import explain
from effnet_fast.modules.layers import Conv2dNormActivation
from one_block import randomise

X = torch.randn(2, 8, 9, 8, generator=torch.Generator().manual_seed(0))


def layer(kernel: Any, stride: int, groups: int, padding: str, dilation: int = 1) -> nn.Module:
    made = Conv2dNormActivation(8, 8, 3, groups=groups, activation_layer=nn.SiLU)
    conv: Any = nn.Conv2d(8, 8, kernel, stride, padding, dilation, groups, bias=False)
    made[0] = conv
    return randomise(made)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("groups", [1, 8], ids=["dense", "depthwise"])
@pytest.mark.parametrize("kernel", [3, 5, (3, 5)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_named_sides_are_pytorchs(kernel: Any, stride: int, groups: int, padding: str) -> None:
    if padding == "same" and stride == 2:
        return  # PyTorch has no such layer
    made = layer(kernel, stride, groups, padding)
    has_kernel = groups == 1 or type(kernel) is int
    assert (explain(made) is None) == has_kernel
    y = made(X)
    with use_backend("reference"):
        stock = made(X)
    assert y.stride() == stock.stride()
    torch.testing.assert_close(y, stock)
    if has_kernel:
        geometry = structure.structure_of(made).geometry
        assert geometry.out_size(9, 8) == tuple(y.shape[2:])


@pytest.mark.parametrize(("kernel", "dilation"), [(2, 1), (4, 1), ((3, 2), 1), (3, 2)], ids=str)
def test_what_is_not_symmetric_or_dilated_is_refused(kernel: Any, dilation: int) -> None:
    made = layer(kernel, 1, 1, "same", dilation)
    assert explain(made) is not None
    with use_backend("reference"):
        stock = made(X)
    assert torch.equal(made(X), stock)


def test_a_name_or_stride_that_pytorch_refuses() -> None:
    for change in ({"padding": "full"}, {"padding": "same", "stride": (2, 2)}):
        made = copy.deepcopy(layer(3, 1, 1, "same"))
        vars(made.get_submodule("0")).update(change)
        assert explain(made) is not None
        with pytest.raises(RuntimeError, match=r"padding|strided"):
            made(X)
