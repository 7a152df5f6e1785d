"""`features` by itself, its slices and sequences that begin with it: from packed weights, too."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import effnet_fast
from effnet_fast.inference.own_plan import plan_of
from networks import Pair, pair, random_images

TAKEN: dict[str, Callable[[nn.Module], nn.Module]] = {
    "features": lambda m: m.features,
    "stem and stages": lambda m: m.features[:4],
    "sequence": lambda m: nn.Sequential(m.features, m.avgpool, nn.Flatten()),
}


def models_of(whose: str) -> Pair:
    """This package's network and torchvision's, or torchvision's twice, the first accelerated."""
    models = pair()
    if whose == "own":
        return models
    actual = effnet_fast.accelerate(copy.deepcopy(models.stock))
    return Pair(actual, models.stock)


def is_planned(features: nn.Module) -> bool:
    """Whether its last forward ran from packed weights."""
    snapshot = plan_of(features).snapshot
    return snapshot is not None and bool(snapshot.engines)


@pytest.fixture(params=["own", "torchvision"])
def models(request: pytest.FixtureRequest) -> Pair:
    return models_of(request.param)


def images() -> Tensor:
    return random_images(2, 48)


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("channels_last", [False, True])
def test_results(models: Pair, name: str, channels_last: bool) -> None:
    x = images()
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    actual, stock = map(TAKEN[name], models.models)
    with torch.no_grad():
        y, expected = actual(x), stock(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert y.stride() == expected.stride()
    assert is_planned(actual[0] if name == "sequence" else actual)


def test_it_is_never_stale(models: Pair) -> None:
    x = images()
    with torch.no_grad():
        models.actual.features(x)
        for edit in (
            lambda m: m.features[2][0].block[0][0].weight.data[0, 0].mul_(-3),
            lambda m: m.features[-1][1].bias.data.add_(0.5),
            lambda m: m.features[3][0].register_forward_hook(lambda *a: a[-1] * 2),
            lambda m: m.features[3][0]._forward_hooks.clear(),
            lambda m: m.features.__setitem__(2, copy.deepcopy(m.features[2]).train()),
            lambda m: m.features.eval(),
            lambda m: m.features.append(nn.ReLU()),
            lambda m: m.features.pop(-1),
            lambda m: m.features.register_forward_hook(lambda *a: -a[-1]),
        ):
            models.apply(edit)
            results = [m.features(x) for m in models.models]
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_gradients_and_training_run_block_by_block(models: Pair) -> None:
    x = images()
    for model in models.models:
        model.features(x).sum().backward()
    assert not is_planned(models.actual.features)
    grads = ([p.grad for p in m.features.parameters()] for m in models.models)
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        torch.manual_seed(0)
        y = models.train().actual.features(x)
        torch.manual_seed(0)
        torch.testing.assert_close(y, models.stock.features(x), rtol=1e-3, atol=1e-3)
    assert not is_planned(models.actual.features)


def test_parts_without_a_stem_run_block_by_block(models: Pair) -> None:
    tails = [m.features[3:] for m in models.models]
    x = torch.randn(2, models.stock.features[3][0].block[0][0].in_channels, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(*(tail(x) for tail in tails), rtol=1e-4, atol=1e-4)
    assert not is_planned(tails[0])


def test_layers_that_torchvision_takes_out(models: Pair) -> None:
    """IntermediateLayerGetter calls each stage by itself."""
    from torchvision.models._utils import IntermediateLayerGetter

    names = {"2": "a", "5": "b"}
    getters = [IntermediateLayerGetter(m.features, return_layers=names) for m in models.models]
    with torch.no_grad():
        y, expected = (getter(images()) for getter in getters)
    assert list(y) == list(expected) == ["a", "b"]
    for name in y:
        torch.testing.assert_close(y[name], expected[name], rtol=1e-4, atol=1e-4)


def test_the_networks_switch_is_that_of_its_features() -> None:
    model, x = models_of("own").actual, images()
    with torch.no_grad():
        model.features(x)
        assert is_planned(model.features)
        model.plan = False
        model.features(x)
        assert plan_of(model.features).snapshot is None
        copied = copy.deepcopy(model)
        assert (copied.plan, copied.features.plan) == (False, False)
        copied.plan = True
        copied.features(x)
        assert is_planned(copied.features)
        copied.train()
        assert plan_of(copied.features).snapshot is None


def test_what_is_packed_goes_with_the_module(models: Pair) -> None:
    features = copy.deepcopy(models.actual.features)
    with torch.no_grad():
        features(images())
    snapshot = weakref.ref(plan_of(features).snapshot)
    del features
    gc.collect()
    assert snapshot() is None


def test_it_looks_like_torchvisions(models: Pair) -> None:
    assert repr(models.actual.features) == repr(models.stock.features)
    kinds = [type(m.features[1:3]).__mro__ for m in models.models]
    assert all(nn.Sequential in mro for mro in kinds)
    scripted = torch.jit.script(models.actual)
    with torch.no_grad():
        x = images()
        torch.testing.assert_close(scripted(x), models.stock(x), rtol=1e-4, atol=1e-4)
