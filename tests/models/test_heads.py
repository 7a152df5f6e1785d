"""Pooling, classifier and the pieces of forward, against timm's of the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import networks
import timm_networks
from effnet_fast import models
from effnet_fast.models import EfficientNet
from networks import TINY, pair, random_images

X = random_images(2, timm_networks.RESOLUTION)
POOLINGS = ("avg", "max", "avgmax", "catavgmax", "")


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert networks.rms(actual - expected) < networks.ALIKE * networks.rms(expected)


class TestAgainstTimm:
    @pytest.mark.slow
    @pytest.mark.parametrize("global_pool", POOLINGS)
    def test_no_classifier(self, global_pool: str) -> None:
        options = {"num_classes": 0, "global_pool": global_pool}
        theirs = timm_networks.theirs(**options)
        ours = models.efficientnet_b0(**options).eval()
        state = timm_networks.ours().features.state_dict()
        ours.features.load_state_dict(state)
        with torch.no_grad():
            assert_close(ours(X), theirs(X))
            assert_close(ours.forward_head(ours.forward_features(X)), theirs(X))
        assert ours.head_hidden_size == theirs.head_hidden_size
        assert ours.num_features == theirs.num_features
        assert type(ours.get_classifier()) is type(theirs.get_classifier()) is nn.Identity

    @pytest.mark.slow
    def test_pieces(self) -> None:
        ours, theirs = timm_networks.ours(), timm_networks.theirs()
        ours.plan = False  # block by block, to the bit
        with torch.no_grad():
            map_, expected = ours.forward_features(X), theirs.forward_features(X)
            assert_close(map_, expected)
            for pre_logits in (False, True):
                assert_close(
                    ours.forward_head(map_, pre_logits=pre_logits),
                    theirs.forward_head(expected, pre_logits=pre_logits),
                )
            assert torch.equal(ours.forward_head(map_), ours(X))

    @pytest.mark.slow
    @pytest.mark.parametrize("global_pool", [None, "max", "catavgmax"])
    def test_reset(self, global_pool: str | None) -> None:
        ours, theirs = timm_networks.ours(), timm_networks.theirs()
        for model in (ours, theirs):
            model.reset_classifier(7, global_pool)
        assert ours.num_classes == theirs.num_classes == 7
        assert ours.head_hidden_size == theirs.head_hidden_size
        last = ours.get_classifier()
        assert last.weight.shape == theirs.get_classifier().weight.shape
        last.load_state_dict(theirs.get_classifier().state_dict())
        with torch.no_grad():
            assert_close(ours(X), theirs(X))


def test_reset_keeps_dropout_mode_dtype_and_names() -> None:
    model = EfficientNet(TINY, dropout=0.35).double()
    model.reset_classifier(4)
    assert model.classifier[0].p == 0.35
    assert model.training
    assert model.classifier.training
    assert model.classifier[1].weight.dtype is torch.float64
    assert [k for k in model.state_dict() if "classifier" in k] == [
        "classifier.1.weight",
        "classifier.1.bias",
    ]
    limit = 1 / 4**0.5
    assert 0.9 * limit < model.classifier[1].weight.abs().max() <= limit
    assert not model.classifier[1].bias.any()
    model.eval().reset_classifier(0)
    assert not model.classifier.training
    assert model(random_images(1, 48).double()).shape == (1, 320)
    model.reset_classifier(3, "max")
    assert model(random_images(1, 48).double()).shape == (1, 3)
    with torch.device("meta"):
        model = EfficientNet(TINY)
    model.reset_classifier(3)
    assert model.classifier[1].weight.is_meta


def test_reset_of_a_classifier_that_the_user_replaced() -> None:
    model = EfficientNet(TINY).eval()
    model.classifier = nn.Identity()
    x = random_images(2, 48)
    assert model.get_classifier() is model.classifier
    assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), model(x))
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    model.classifier = nn.Sequential(nn.Linear(320, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    assert model.get_classifier() is model.classifier[2]
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 8)


def test_no_classifier_is_torchvisions_identity() -> None:
    models_ = pair()
    models_.stock.classifier = nn.Identity()
    models_.actual.reset_classifier(0)
    models_.assert_alike(random_images(2, 48))


def test_training_draws_dropout_before_the_classifier() -> None:
    """The same draws whether the head is called as a whole or in pieces, and as torchvision's."""
    models_ = pair().train()
    x = random_images(4, 48)
    outputs = []
    for run in (
        models_.actual,
        models_.stock,
        lambda x: models_.actual.forward_head(models_.actual.forward_features(x)),
        lambda x: models_.actual.classifier[1](
            models_.actual.forward_head(models_.actual.forward_features(x), pre_logits=True)
        ),
    ):
        torch.manual_seed(3)
        outputs.append(run(x).detach())
    for y in outputs[1:]:
        assert_close(y, outputs[0])


def test_unpooled_maps_are_not_overwritten() -> None:
    model = EfficientNet(TINY, num_classes=0, global_pool="", dropout=0.5).train()
    features = model.forward_features(random_images(2, 48))
    before = features.clone()
    y = model.forward_head(features)
    assert torch.equal(features, before)
    assert not torch.equal(y, before)
    y.sum().backward()


class TestRefusals:
    @pytest.mark.parametrize("pool", ["fast", "mean", None, 1], ids=str)
    def test_unknown_pooling(self, pool: object) -> None:
        with pytest.raises(ValueError, match=r"global_pool must be one of 'avg', 'max'.*got"):
            EfficientNet(TINY, global_pool=pool)  # type: ignore[arg-type]
        if pool is not None:
            with pytest.raises(ValueError, match="global_pool must be one of"):
                EfficientNet(TINY).reset_classifier(3, pool)  # type: ignore[arg-type]

    def test_classifier_of_maps(self) -> None:
        with pytest.raises(ValueError, match=r"global_pool='' .*classifier of 1000.*num_classes=0"):
            EfficientNet(TINY, global_pool="")
        model = EfficientNet(TINY, num_classes=0, global_pool="")
        with pytest.raises(ValueError, match="num_classes=0"):
            model.reset_classifier(3)
        assert model.num_classes == 0

    @pytest.mark.parametrize("count", [-1, 2.0, True, None], ids=str)
    def test_count(self, count: object) -> None:
        model = EfficientNet(TINY)
        with pytest.raises(ValueError, match="num_classes must be an int of at least 0"):
            model.reset_classifier(count)  # type: ignore[arg-type]
        assert model.classifier[1].out_features == 1000
