"""Head and pooling as one op in a network's forward: where it stands in, and where it does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import effnet_fast
from effnet_fast.models.variants import Stage
from effnet_fast.modules import fused_forward
from networks import run_network
from parity import assert_parity

STAGES = (Stage(1, 3, 1, 8, 8, 1), Stage(2, 3, 2, 8, 16, 1))


def network(**options: Any) -> nn.Module:
    model = effnet_fast.efficientnet(
        depth=1.0, width=1.0, resolution=24, stages=STAGES, num_classes=5, **options
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.2, 0.6)
    return model.eval()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = fused_forward.pointwise_bn_silu_pool
    monkeypatch.setattr(
        fused_forward,
        "pointwise_bn_silu_pool",
        lambda *a: calls.append(1) or original(*a),
    )
    return calls


@pytest.mark.exhaustive
@torch.no_grad()
def test_network(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    model, x = network(backend="triton"), torch.randn(3, 3, 12, 10)
    y, in_layers = model(x), model.forward_head(model.forward_features(x))
    assert len(calls) == 1
    model.backend = "reference"
    stock, exact = model(x), model.double()(x.double())
    assert_parity({"y": y}, {"y": stock}, {"y": exact}, torch.float32)
    assert_parity({"y": in_layers}, {"y": stock}, {"y": exact}, torch.float32)
    assert len(calls) == 1
    assert (stock[0] - stock[1]).abs().max() > 1e3 * (y - stock).abs().max()


@pytest.mark.exhaustive
def test_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in training, and one with the last norm frozen: every gradient, and the statistics.

    Over three batches, as for whole networks: of a gradient of two numbers stock's error is luck.
    """
    calls = counted(monkeypatch)
    batches = torch.randn(9, 3, 16, 12).split(3)
    for frozen in (False, True):
        model = network(backend="triton").train()
        model.features[-1][1].train(not frozen)
        stock, exact = copy.deepcopy(model), copy.deepcopy(model).double()
        stock.backend = exact.backend = "reference"
        runs = [
            [run_network(m, x.to(m.classifier[1].weight.dtype)) for x in batches]
            for m in (model, stock, exact)
        ]
        joined = [{k: torch.stack([step[k] for step in run]) for k in run[0]} for run in runs]
        assert_parity(*joined, torch.float32)
    assert len(calls) == 6


@torch.no_grad()
def test_a_hook_sees_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, seen = counted(monkeypatch), []
    model = network(backend="triton")
    model.features[-1].register_forward_hook(lambda m, args, y: seen.append(y.shape))
    model(torch.randn(2, 3, 12, 10))
    assert not calls
    assert len(seen) == 1
