"""Encoders and intermediate maps, against timm's of the same weights."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import networks
import timm_networks
from effnet_fast import models
from effnet_fast.models import VARIANTS, EfficientNet, EfficientNetFeatures
from effnet_fast.models.feature_info import FeatureInfo, describe, take_indices
from networks import TINY, pair, random_images

X = random_images(2, 48)
MAPS = {"reductions": [2, 4, 8, 16, 32], "b0": [16, 24, 40, 112, 320], "b7": [32, 48, 80, 224, 640]}


def encoder(**options: object) -> EfficientNetFeatures:
    """A well-conditioned encoder in eval mode."""
    model = EfficientNetFeatures(TINY, **options)  # type: ignore[arg-type]
    model.load_state_dict(networks.calibrated_state(TINY))
    return model.eval()


def classifier() -> EfficientNet:
    model = pair().actual
    assert isinstance(model, EfficientNet)
    return model


class Segmenter(nn.Module):
    """A small decoder over an encoder, as segmentation libraries build them."""

    def __init__(self, encoder: nn.Module, classes: int = 3) -> None:
        super().__init__()
        self.encoder = encoder
        channels = encoder.feature_info.channels()
        self.lateral = nn.ModuleList(nn.Conv2d(c, 8, 1) for c in channels)
        self.head = nn.Conv2d(8, classes, 3, padding=1)
        self.scale = encoder.feature_info.reduction()[0]

    def forward(self, x: Tensor) -> Tensor:
        maps = [conv(m) for conv, m in zip(self.lateral, self.encoder(x), strict=True)]
        y = maps[-1]
        for finer in maps[-2::-1]:
            y = finer + F.interpolate(y, size=finer.shape[-2:])
        return F.interpolate(self.head(y), scale_factor=self.scale)


class TestAgainstTimm:
    @pytest.mark.slow
    @pytest.mark.parametrize("out_indices", [(0, 1, 2, 3, 4), (1, 2, 3), (4,), (2, -1)], ids=str)
    def test_maps(self, out_indices: tuple[int, ...]) -> None:
        x = random_images(2, timm_networks.RESOLUTION)
        theirs = timm_networks.theirs(features_only=True, out_indices=out_indices)
        ours = models.efficientnet_b0(features_only=True, out_indices=out_indices).eval()
        ours.load_state_dict(timm_networks.ours().state_dict())
        with torch.no_grad():
            for a, b in zip(ours(x), theirs(x), strict=True):
                assert networks.rms(a - b) < networks.ALIKE * networks.rms(b)
        assert ours.feature_info.channels() == theirs.feature_info.channels()
        assert ours.feature_info.reduction() == theirs.feature_info.reduction()

    @pytest.mark.slow
    @pytest.mark.parametrize("extra_blocks", [False, True])
    @pytest.mark.parametrize("indices", [None, 2, [0, 3], [-2], [1, -1]], ids=str)
    def test_intermediates(self, indices: object, extra_blocks: bool) -> None:
        x = random_images(1, timm_networks.RESOLUTION)
        ours, theirs = timm_networks.ours(), timm_networks.theirs()
        for stop_early in (False, True):
            options = {"stop_early": stop_early, "extra_blocks": extra_blocks}
            with torch.no_grad():
                y, maps = ours.forward_intermediates(x, indices, **options)
                expected, others = theirs.forward_intermediates(x, indices, **options)
            for a, b in zip([y, *maps], [expected, *others], strict=True):
                assert a.shape == b.shape
                assert networks.rms(a - b) < networks.ALIKE * networks.rms(b)

    def test_indices(self) -> None:
        from timm.models._features import feature_take_indices

        for indices in (None, 1, 5, [0], [1, -1], (0, 1, 2)):
            assert take_indices(5, indices) == feature_take_indices(5, indices)[0]


@pytest.mark.parametrize("name", ["b0", "b7"])
def test_published_channels_and_strides(name: str) -> None:
    info = FeatureInfo(describe(VARIANTS[name]))
    assert info.channels() == MAPS[name]
    assert info.reduction() == MAPS["reductions"]
    assert info.module_name() == [f"features.{i}" for i in (1, 2, 3, 5, 7)]
    assert len(info) == 5
    assert info[2]["num_chs"] == info.channels(2) == info.channels([2])[0]
    assert info.get_dicts(["index"], [0, 4]) == [{"index": 0}, {"index": 4}]
    assert info.get_dicts(idx=1)["module"] == "features.2"


def test_channels_and_strides_of_v2() -> None:
    info = FeatureInfo(describe(VARIANTS["v2_s"]))
    assert info.channels() == [24, 48, 64, 160, 256]
    assert info.reduction() == MAPS["reductions"]
    assert info.module_name() == [f"features.{i}" for i in (1, 2, 3, 5, 6)]


def test_maps_are_the_classifiers_own() -> None:
    model, features = classifier(), encoder()
    model.plan = features.plan = False
    seen: list[Tensor] = []
    for path in features.feature_info.module_name():
        model.get_submodule(path).register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        model(X)
        for actual, expected in zip(features(X), seen, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize(("out_indices", "built"), [(1, 8), ((0,), 2), ((2, 0), 4), ((-2,), 6)])
def test_later_layers_are_not_built(out_indices: object, built: int) -> None:
    model = EfficientNetFeatures(TINY, out_indices=out_indices)  # type: ignore[arg-type]
    assert len(model.features) == built
    whole = classifier().state_dict()
    state = model.state_dict()
    assert list(state) == list(whole)[: len(state)]
    assert all(state[k].shape == whole[k].shape for k in state)
    maps = model.eval()(random_images(2, 64))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == model.feature_info.reduction()


@pytest.mark.parametrize("stages", [1, 3])
def test_all_maps_of_a_network_with_fewer(stages: int) -> None:
    model = EfficientNetFeatures(replace(TINY, baseline=TINY.baseline[:stages])).eval()
    assert len(model.features) == stages + 1
    maps = model(random_images(1, 32))
    assert [32 // m.shape[2] for m in maps] == model.feature_info.reduction() == [2, 4, 8][:stages]


def test_order_of_indices_does_not_matter() -> None:
    """Maps and their description go from fine to coarse, whichever the order asked for."""
    model = encoder(out_indices=(3, 1))
    assert model.feature_info.out_indices == (1, 3)
    assert [m.shape[1] for m in model(X)] == model.feature_info.channels()


class TestStateDict:
    def test_takes_a_classifiers(self) -> None:
        state = classifier().state_dict()
        keys = list(state)
        model = EfficientNetFeatures(TINY, out_indices=(0, 1))
        model.load_state_dict(state)
        assert list(state) == keys, "the caller's dict was changed"
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[key]), key

    def test_inside_another_module(self) -> None:
        state = {f"encoder.{k}": v for k, v in classifier().state_dict().items()}
        outer = nn.Module()
        outer.encoder = EfficientNetFeatures(TINY, out_indices=(0, 1))
        outer.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"Unexpected key.*encoder\.neck"):
            outer.load_state_dict({**state, "encoder.neck.weight": torch.zeros(1)})

    def test_refuses_the_rest(self) -> None:
        state = encoder().state_dict()
        with pytest.raises(RuntimeError, match=r"Unexpected key.*features\.9\.0\.weight"):
            EfficientNetFeatures(TINY).load_state_dict({**state, "features.9.0.weight": X})
        del state["features.0.0.weight"]
        with pytest.raises(RuntimeError, match=r"Missing key.*features\.0\.0\.weight"):
            EfficientNetFeatures(TINY).load_state_dict(state)

    def test_of_a_subclass_with_a_classifier_of_its_own(self) -> None:
        class Dense(EfficientNetFeatures):
            def __init__(self) -> None:
                super().__init__(TINY, out_indices=(0,))
                self.classifier = nn.Conv2d(8, 2, 1)

        model, other = Dense(), Dense()
        model.load_state_dict(other.state_dict())
        assert torch.equal(model.classifier.weight, other.classifier.weight)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_segmentation(training: bool) -> None:
    """Forward and backward through a decoder, against torchvision's stages under the same one."""

    class Stock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = pair().stock.features[:8]
            self.feature_info = encoder().feature_info

        def forward(self, x: Tensor) -> list[Tensor]:
            maps = []
            for index, stage in enumerate(self.features):
                x = stage(x)
                if index in (1, 2, 3, 5, 7):
                    maps.append(x)
            return maps

    results = []
    for build in (encoder, Stock):
        torch.manual_seed(0)
        decoder = Segmenter(encoder()).state_dict()
        model = Segmenter(build())
        model.load_state_dict(decoder)
        results.append(networks.run_network(model.train(training), random_images(2, 64)))
    networks.assert_alike(*results)


def test_segmenter_is_copied_pickled_and_replicated() -> None:
    model = Segmenter(encoder()).eval()
    with torch.no_grad():
        y = model(random_images(1, 64))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(random_images(1, 64)), y)
    wrapped = nn.DataParallel(model)
    torch.testing.assert_close(wrapped(random_images(1, 64)), y, rtol=1e-3, atol=1e-3)


def test_backend_of_an_encoder() -> None:
    model = encoder(backend="reference")
    stock = pair().stock.features[:2]
    x = X.to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(model(x)[0], stock(x))


class TestRefusals:
    @pytest.mark.parametrize("indices", [6, 0, -1, (5,), (-6,), (0, 7)], ids=str)
    def test_maps_that_do_not_exist(self, indices: object) -> None:
        with pytest.raises(IndexError, match=r"feature map"):
            EfficientNetFeatures("b0", out_indices=indices)  # type: ignore[arg-type]
        with pytest.raises(IndexError, match=r"feature map"):
            classifier().forward_intermediates(X, indices)  # type: ignore[arg-type]

    @pytest.mark.parametrize("indices", [(), (1, 1), (0, -5)], ids=str)
    def test_none_or_one_twice(self, indices: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="at least one feature map, each once"):
            EfficientNetFeatures("b0", out_indices=indices)

    @pytest.mark.parametrize("indices", ["01", (0.0,), (True,), 1.5], ids=str)
    def test_no_ints(self, indices: object) -> None:
        with pytest.raises(TypeError, match="int"):
            EfficientNetFeatures("b0", out_indices=indices)  # type: ignore[arg-type]

    def test_format(self) -> None:
        with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
            classifier().forward_intermediates(X, output_fmt="NLC")


def test_custom_networks_have_their_own_maps() -> None:
    stages = models.Stage(1, 3, 2, 16, 24, 1), models.Stage(4, 5, 1, 24, 32, 2)
    model = models.efficientnet(stages=stages, features_only=True, out_indices=(0, 1))
    assert model.feature_info.reduction() == [2, 4]
    assert model.feature_info.module_name() == ["features.0", "features.2"]
    assert [tuple(m.shape[1:]) for m in model.eval()(X)] == [(16, 24, 24), (32, 12, 12)]
