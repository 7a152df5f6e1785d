"""What timm's blocks may have beside the usual: they run as stock then, and doctor says why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import BlurPool2d, DropPath
from timm.models._efficientnet_blocks import (
    ConvBnAct,
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
)
from torch import nn

import effnet_fast
from effnet_fast.modules.explain import explain

X = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def keep_the_scale(block: Any) -> None:
    block.drop_path = DropPath(0.5, scale_by_keep=False)


# Makers of blocks, what is done to them, and a piece of the reason.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], object], str]] = {
    "space to depth": (
        lambda: DepthwiseSeparableConv(16, 16, stride=2, s2d=1), lambda m: None, "conv_s2d"
    ),
    "anti-aliasing": (
        lambda: InvertedResidual(16, 16, stride=2, aa_layer=BlurPool2d), lambda m: None, "aa"
    ),
    "activation behind the projection": (
        lambda: DepthwiseSeparableConv(16, 16, pw_act=True), lambda m: None, "block is not expand"
    ),
    "drop-path that keeps the scale": (
        lambda: InvertedResidual(16, 16, exp_ratio=4.0), keep_the_scale, "keeps the scale"
    ),
    "squeeze-and-excitation behind a dense convolution": (
        lambda: EdgeResidual(16, 16), lambda m: setattr(m, "se", nn.Sigmoid()), "se is Sigmoid"
    ),
    "dilation": (
        lambda: InvertedResidual(16, 16, dilation=2), lambda m: None, "conv_dw has dilation (2, 2)"
    ),
    "another padding mode": (
        lambda: ConvBnAct(16, 16, 3),
        lambda m: setattr(m.conv, "padding_mode", "reflect"),
        "conv has padding mode 'reflect'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_runs_as_stock(name: str) -> None:
    make, change, reason = CASES[name]
    torch.manual_seed(0)
    stock = make().train()
    change(stock)
    actual = effnet_fast.accelerate(copy.deepcopy(stock))
    found = explain(actual)
    assert found is not None
    assert reason in found, found
    results = []
    for module in (actual, stock):
        torch.manual_seed(1)
        results.append(module(X))
    assert torch.equal(*results)


def test_the_same_without_is_fused() -> None:
    for make in (
        lambda: DepthwiseSeparableConv(16, 16, stride=2),
        lambda: InvertedResidual(16, 16, exp_ratio=4.0, drop_path_rate=0.5),
        lambda: EdgeResidual(16, 16),
        lambda: ConvBnAct(16, 16, 3),
    ):
        assert explain(effnet_fast.accelerate(make()).train()) is None
