"""Head and pooling as one op in a network's forward: where it stands in, and where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effnet_fast
from effnet_fast import fusion
from effnet_fast.models.variants import Stage
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
    original = fusion.pointwise_bn_silu_pool_eval
    monkeypatch.setattr(
        fusion, "pointwise_bn_silu_pool_eval", lambda *a: calls.append(1) or original(*a)
    )
    return calls


@torch.no_grad()
def test_network(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    model, x = network(backend="triton"), torch.randn(3, 3, 24, 20)
    y, in_layers = model(x), model.forward_head(model.forward_features(x))
    assert len(calls) == 1
    model.backend = "reference"
    stock, exact = model(x), model.double()(x.double())
    assert_parity({"y": y}, {"y": stock}, {"y": exact}, torch.float32)
    assert_parity({"y": in_layers}, {"y": stock}, {"y": exact}, torch.float32)
    assert len(calls) == 1
    assert (stock[0] - stock[1]).abs().max() > 1e3 * (y - stock).abs().max()


@torch.no_grad()
@pytest.mark.parametrize("method", ["forward_features", "forward_head"])
def test_a_subclass_is_heard(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    model, x = network(backend="triton"), torch.randn(2, 3, 24, 20)
    own = {method: lambda self, x: 0 * getattr(effnet_fast.EfficientNet, method)(self, x)}
    model.__class__ = type("Own", (type(model),), own)
    y = model(x)
    assert not calls
    assert torch.equal(y, model.forward_head(model.forward_features(x)))


def hook(*_: Any) -> None:
    pass


OBSERVERS: dict[str, Callable[[Any], Any]] = {
    "features": lambda m: m.features.register_forward_hook(hook),
    "head": lambda m: m.features[-1].register_forward_hook(hook),
    "convolution": lambda m: m.features[-1][0].register_forward_hook(hook),
    "activation": lambda m: m.features[-1][2].register_forward_pre_hook(hook),
    "avgpool": lambda m: m.avgpool.register_forward_hook(hook),
    "other_pool": lambda m: setattr(m, "avgpool", nn.AdaptiveMaxPool2d(1)),
    "larger_pool": lambda m: setattr(m, "avgpool", nn.AdaptiveAvgPool2d((1, 2))),
    "patched": lambda m: setattr(m, "forward_features", m.forward_features),
    "other_activation": lambda m: m.features[-1].__setitem__(2, nn.ReLU()),
    "batch_statistics": lambda m: m.features[-1].train(),
    "cpu": lambda m: setattr(m, "backend", "cpu"),
    "auto": lambda m: setattr(m, "backend", "auto"),
}


@pytest.mark.parametrize("name", OBSERVERS)
def test_what_is_seen_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    model = network(backend="triton")
    if name == "larger_pool":
        model.classifier = nn.Identity()
    OBSERVERS[name](model)
    with torch.no_grad():
        y = model(torch.randn(2, 3, 24, 20))
    assert not calls
    assert isinstance(y, Tensor)


def test_gradients_go_by_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    model = network(backend="triton")
    model(torch.randn(2, 3, 24, 20)).sum().backward()
    assert not calls
    assert model.features[-1][0].weight.grad is not None
