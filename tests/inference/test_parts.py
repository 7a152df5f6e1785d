"""The modules that networks hand over to be packed, and the methods that may not change."""

from __future__ import annotations

import functools
import types

import pytest
import torch

from effnet_fast import use_backend
from effnet_fast.inference.parts import METHODS, changed_method, changed_step
from effnet_fast.models import EfficientNet, EfficientNetFeatures
from networks import TINY, random_images


def test_a_classifier() -> None:
    model = EfficientNet(TINY, num_classes=3, global_pool="max").eval()
    parts = model.inference_parts()
    assert parts.features is model.features
    assert (parts.layers, parts.taps) == (tuple(model.features), ())
    assert parts.head is not None
    assert (parts.head.pool, parts.head.classifier) == (model.avgpool, model.classifier)
    with torch.no_grad(), use_backend("reference"):
        x = random_images(1, 48).to(memory_format=torch.channels_last)
        assert torch.equal(parts.head.run(model.features[:-1](x)), model(x))
    assert parts.head.flattens
    unpooled = EfficientNet(TINY, num_classes=0, global_pool="").inference_parts()
    assert unpooled.head is not None
    assert not unpooled.head.flattens


def test_an_encoder() -> None:
    model = EfficientNetFeatures(TINY, out_indices=(0, 2))
    parts = model.inference_parts()
    assert parts.head is None
    assert parts.taps == tuple(model.feature_info.get("stage"))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_changed_method_is_named(name: str) -> None:
    model = EfficientNet(TINY)
    own = type("Own", (EfficientNet,), {name: lambda self, x: x})(TINY)
    assert changed_method(model) is None
    assert changed_method(own) == f"it overrides {name}"
    assert changed_step(own) == (None if name == "forward" else f"it overrides {name}")
    setattr(model, name, print)
    assert changed_method(model) == f"its {name} is patched"
    assert changed_step(model) == (None if name == "forward" else f"its {name} is patched")


@pytest.mark.parametrize("name", sorted(METHODS - {"_maps"}))
def test_a_method_replaced_on_its_class_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, own = EfficientNet(TINY), type("Own", (EfficientNet,), {})(TINY)
    monkeypatch.setattr(EfficientNet, name, lambda self, x: x)
    assert changed_method(model) == changed_method(own) == f"EfficientNet.{name} is replaced"
    monkeypatch.undo()
    assert changed_method(model) is changed_method(own) is None


def test_a_forward_that_is_the_classs_own_is_none_of_the_instances() -> None:
    """Bound to this very instance; another's, or another function, is one."""
    model, other = EfficientNet(TINY), EfficientNet(TINY)
    model.forward = types.MethodType(EfficientNet.forward, model)
    assert changed_method(model) is None
    model.forward_head = model.forward_head
    assert changed_method(model) == "its forward_head is patched"
    del model.forward_head
    for forward in (other.forward, model.forward_features, functools.partial(model.forward)):
        model.forward = forward
        assert changed_method(model) == "its forward is patched"
        assert changed_step(model) is None


def test_a_class_with_parts_of_its_own_answers_for_its_forward() -> None:
    class Own(EfficientNet):
        inference_parts = EfficientNet.inference_parts
        forward_head = EfficientNet.forward

    class Patched(Own):
        forward_features = EfficientNet.forward

    assert changed_method(Own(TINY)) is None
    assert changed_method(Patched(TINY)) == "it overrides forward_features"
