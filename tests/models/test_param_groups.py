"""Parameter groups by depth, against timm's."""

from __future__ import annotations

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

import timm_networks
from effnet_fast.models import EfficientNet, EfficientNetFeatures
from networks import TINY, random_images


def described(groups: list[dict], names: dict[int, str]) -> dict[str, tuple[float, float]]:
    """Learning-rate scale and weight decay of each parameter by name."""
    return {
        names[id(p)]: (group.get("lr_scale", group.get("lr")), group["weight_decay"])
        for group in groups
        for p in group["params"]
    }


@pytest.mark.slow
@pytest.mark.parametrize(("layer_decay", "min_scale"), [(0.75, 0.0), (0.5, 0.1), (1.0, 0.0)])
def test_scales_and_decays_are_timms(layer_decay: float, min_scale: float) -> None:
    """Parameters are registered in the same order, so that they can be told by their place."""
    ours, theirs = timm_networks.ours(), timm_networks.theirs()
    options = {"layer_decay": layer_decay, "min_scale": min_scale}
    places = [{id(p): str(i) for i, p in enumerate(m.parameters())} for m in (ours, theirs)]
    actual = described(ours.param_groups(1.0, 0.05, **options), places[0])
    expected = described(param_groups_layer_decay(theirs, 0.05, **options), places[1])
    assert len(actual) == len(list(ours.parameters()))
    assert actual.keys() == expected.keys()
    for place, (scale, decay) in expected.items():
        assert actual[place] == (pytest.approx(scale), decay), place


def test_timms_own_tool_takes_the_network() -> None:
    ours, theirs = timm_networks.ours(), timm_networks.theirs()
    places = [{id(p): str(i) for i, p in enumerate(m.parameters())} for m in (ours, theirs)]
    groups = [param_groups_layer_decay(m, 0.05) for m in (ours, theirs)]
    assert described(groups[0], places[0]) == described(groups[1], places[1])
    for coarse in (False, True):
        from timm.models import group_parameters

        counts = [len(group_parameters(m, m.group_matcher(coarse=coarse))) for m in (ours, theirs)]
        assert counts[0] == counts[1] == (9 if coarse else 18)


def test_every_trainable_parameter_once() -> None:
    model = EfficientNet(TINY).freeze(2)
    model.features[6][0].requires_grad_(False)
    groups = model.param_groups(0.1)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}
    whole = {g["name"]: g["lr"] for g in EfficientNet(TINY).param_groups(0.1)}
    assert all(whole[g["name"]] == g["lr"] for g in groups), "depths count from the whole network"


def test_groups_drive_an_optimiser() -> None:
    model = EfficientNet(TINY)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    groups = model.param_groups(0.1, 0.0, layer_decay=0.5)
    optimizer = torch.optim.SGD(groups, lr=123.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    layers = max(int(g["name"].split("_")[1]) for g in groups)
    moved = {k: (before[k] - p).mean().item() for k, p in model.named_parameters()}
    assert moved["classifier.1.weight"] == pytest.approx(0.1, rel=1e-4)
    assert moved["features.8.0.weight"] == pytest.approx(0.05, rel=1e-4)
    assert moved["features.7.0.block.0.0.weight"] == pytest.approx(0.05, rel=1e-4)
    assert moved["features.0.0.weight"] == pytest.approx(0.1 * 0.5**layers, rel=1e-2)


def test_named_parameters_without_decay() -> None:
    model = EfficientNet(TINY)
    groups = model.param_groups(0.1, 0.3, no_weight_decay=("features.0.*", "classifier.1.weight"))
    free = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    assert id(model.features[0][0].weight) in free
    assert id(model.classifier[1].weight) in free
    assert id(model.features[1][0].block[0][0].weight) not in free
    assert all(id(p) in free for p in model.parameters() if p.ndim == 1)


def test_encoder_and_network_without_classifier() -> None:
    """The last block has the full rate then."""
    for model in (EfficientNetFeatures(TINY, out_indices=2), EfficientNet(TINY, num_classes=0)):
        groups = model.param_groups(0.1)
        assert max(g["lr"] for g in groups) == 0.1
        (lr,) = {g["lr"] for g in groups for p in g["params"] if p is list(model.parameters())[-1]}
        assert lr == 0.1
        model.eval()(random_images(1, 48))


def test_parametrized_weights() -> None:
    model = EfficientNet(TINY)
    conv = model.features[2][0].block[0][0]
    lr = {id(p): g["lr"] for g in model.param_groups(1.0) for p in g["params"]}[id(conv.weight)]
    nn.utils.parametrize.register_parametrization(conv, "weight", nn.Identity())
    original = conv.parametrizations.weight.original
    assert {id(p): g["lr"] for g in model.param_groups(1.0) for p in g["params"]}[
        id(original)
    ] == lr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layer_decay": 0.0}, "layer_decay must be above 0 and at most 1, got 0.0"),
        ({"layer_decay": 1.1}, "layer_decay .* got 1.1"),
        ({"min_scale": -0.1}, "min_scale must be between 0 and 1"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and not negative"),
        ({"lr": float("nan")}, "lr must be finite"),
    ],
)
def test_refuses(options: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EfficientNet(TINY).param_groups(**{"lr": 0.1, **options})
