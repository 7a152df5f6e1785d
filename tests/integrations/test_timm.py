"""timm builds, wraps, saves and prunes the networks as its own."""

from __future__ import annotations

import math
import sys
import warnings

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.layers.test_time_pool import apply_test_time_pool
from timm.models import load_checkpoint
from timm.models._features import FeatureGetterNet
from timm.models._hub import save_for_hf
from timm.optim import create_optimizer_v2

import effnet_fast
from effnet_fast.models import VARIANTS, EfficientNet, EfficientNetFeatures
from effnet_fast.models.variants import LITE_MEAN
from networks import TINY, calibrated_state
from timm_networks import RESOLUTION, ours

NAMES = [f"effnet_fast_{name}" for name in VARIANTS]
WRAPPERS = ("getter", "list", "dict", "hook", "fx")


@pytest.fixture(autouse=True)
def registered() -> None:
    effnet_fast.register_timm()


def images(channels: int = 3, side: int = 64) -> torch.Tensor:
    return torch.randn(2, channels, side, side)


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    states = a.state_dict(), b.state_dict()
    return list(states[0]) == list(states[1]) and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


class TestRegistry:
    def test_names(self):
        assert effnet_fast.register_timm() == NAMES
        assert set(timm.list_models("effnet_fast_*")) == set(NAMES)

    def test_registering_twice_is_silent(self):
        entry = timm.model_entrypoint("effnet_fast_b0")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            effnet_fast.register_timm()
        assert timm.model_entrypoint("effnet_fast_b0") is entry

    def test_without_timm(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        monkeypatch.setitem(sys.modules, "timm.models", None)
        with pytest.raises(ImportError, match=r'pip install "effnet-fast\[timm\]"'):
            effnet_fast.register_timm()

    def test_tags_are_the_published_weights(self):
        assert "effnet_fast_b1.imagenet1k_v1" in timm.list_pretrained("effnet_fast*")
        default = timm.get_pretrained_cfg("effnet_fast_b1")
        assert (default.tag, default.url) == (
            "imagenet1k_v2",
            effnet_fast.EfficientNet_B1_Weights.IMAGENET1K_V2.url,
        )
        assert not timm.models.is_model_pretrained("effnet_fast_b8")

    @pytest.mark.parametrize("name", NAMES)
    def test_preprocessing(self, name):
        variant = VARIANTS[name.removeprefix("effnet_fast_")]
        cfg = timm.get_pretrained_cfg(name)
        channels, height, width = cfg.input_size
        assert (channels, height, width) == (3, variant.crop, variant.crop)
        if name == "effnet_fast_b1":  # its second weights have a preset of their own
            assert math.floor(height / cfg.crop_pct) == 255
        else:
            assert math.floor(height / cfg.crop_pct) == variant.resize
            assert cfg.interpolation == variant.interpolation
            assert (cfg.mean, cfg.std) == (variant.mean, variant.std)
        assert cfg.pool_size == (-(-height // 32),) * 2


class TestCreate:
    def test_options(self):
        model = timm.create_model(
            "effnet_fast_b0",
            drop_rate=0.3,
            drop_path_rate=0.1,
            in_chans=1,
            num_classes=5,
            global_pool="avgmax",
            bn_eps=1e-2,
            bn_momentum=0.2,
            backend="reference",
            memory="lean",
            scriptable=False,
            img_size=None,
        )
        assert type(model) is EfficientNet
        assert model.classifier[0].p == 0.3
        assert model.features[7][0].stochastic_depth.p == pytest.approx(0.1 * 15 / 16)
        norm = model.features[0][1]
        assert (norm.eps, norm.momentum) == (1e-2, 0.2)
        assert (model.backend, model.memory, model.global_pool) == ("reference", "lean", "avgmax")
        assert model(images(1)).shape == (2, 5)

    def test_nothing_is_dropped_unless_asked(self):
        model = timm.create_model("effnet_fast_b0")
        assert model.classifier[0].p == 0
        assert {
            block.stochastic_depth.p for stage in list(model.features)[1:-1] for block in stage
        } == {0}

    def test_draws_are_those_of_the_constructor(self):
        torch.manual_seed(3)
        model = timm.create_model("effnet_fast_b0", num_classes=4)
        torch.manual_seed(3)
        assert same_state(model, effnet_fast.efficientnet_b0(num_classes=4))

    def test_device_and_dtype(self):
        model = timm.create_model("effnet_fast_v2_s", device="meta", dtype=torch.bfloat16)
        assert {(p.is_meta, p.dtype) for p in model.parameters()} == {(True, torch.bfloat16)}

    @pytest.mark.parametrize("option", [{"output_stride": 16}, {"act_layer": "relu"}], ids=str)
    def test_refuses_what_it_cannot_build(self, option):
        with pytest.raises((ValueError, TypeError), match=next(iter(option))):
            timm.create_model("effnet_fast_b0", **option)

    def test_configuration(self):
        model = timm.create_model("effnet_fast_lite0", pretrained_cfg_overlay={"crop_pct": 0.5})
        assert model.default_cfg is model.pretrained_cfg
        assert (model.pretrained_cfg["crop_pct"], model.pretrained_cfg["mean"]) == (0.5, LITE_MEAN)
        assert resolve_data_config({}, model=model)["input_size"] == (3, 224, 224)
        cfg = model.pretrained_cfg
        assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
        assert model.get_submodule(cfg["first_conv"]) is model.features[0][0]

    def test_what_the_scripts_call(self):
        model = timm.create_model("effnet_fast_b0", num_classes=2)
        model.set_grad_checkpointing(enable=True)
        optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
        rates = {
            id(p): (g["lr"] * g["lr_scale"], g["weight_decay"])
            for g in optimizer.param_groups
            for p in g["params"]
        }
        assert len(rates) == len(list(model.parameters()))
        assert rates[id(model.get_classifier().weight)] == (1.0, 0.1)
        assert rates[id(model.get_classifier().bias)] == (1.0, 0.0)
        assert rates[id(model.features[0][0].weight)][0] < 1e-4
        pooled, is_pooled = apply_test_time_pool(model.eval(), {"input_size": (3, 256, 256)})
        assert is_pooled
        assert pooled(images(side=256)).shape == (2, 2)


class TestWeights:
    def test_pretrained(self):
        model = timm.create_model("effnet_fast_lite0", pretrained=True)
        assert same_state(model, effnet_fast.efficientnet_lite0(weights="DEFAULT"))

    def test_pretrained_with_other_ends(self):
        model = timm.create_model("effnet_fast_lite0", pretrained=True, num_classes=2, in_chans=1)
        whole = effnet_fast.efficientnet_lite0(weights="DEFAULT", in_chans=1)
        assert same_state(model.features, whole.features)
        assert model.classifier[1].weight.shape == (2, 1280)

    def test_pretrained_encoder(self):
        model = timm.create_model(
            "effnet_fast_lite0.imagenet1k_v1", pretrained=True, features_only=True
        )
        expected = effnet_fast.efficientnet_lite0(weights="DEFAULT", features_only=True)
        assert same_state(model, expected)

    def test_networks_without_weights(self):
        with pytest.raises(RuntimeError, match="No pretrained weights exist for effnet_fast_lite3"):
            timm.create_model("effnet_fast_lite3", pretrained=True)

    def test_files(self, tmp_path):
        source = effnet_fast.efficientnet_b0(num_classes=7)
        torch.save({"state_dict": source.state_dict()}, tmp_path / "last.pth.tar")
        path = str(tmp_path / "last.pth.tar")
        model = timm.create_model("effnet_fast_b0", num_classes=7, checkpoint_path=path)
        assert same_state(model, source)
        load_checkpoint(timm.create_model("effnet_fast_b0", num_classes=7), path)
        overlay = {"file": path, "num_classes": -1}  # as train.py --pretrained-path asks
        tuned = timm.create_model(
            "effnet_fast_b0", pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay
        )
        assert same_state(tuned.features, source.features)
        assert tuned.num_classes == 3

    def test_files_of_other_packages_are_refused(self, tmp_path):
        torch.save(timm.create_model("efficientnet_b0").state_dict(), tmp_path / "a.pth")
        overlay = {"file": str(tmp_path / "a.pth")}
        with pytest.raises(ValueError, match=r"weights of another network: .*\.from_checkpoint"):
            timm.create_model("effnet_fast_b0", pretrained=True, pretrained_cfg_overlay=overlay)

    def test_timms_own_folders(self, tmp_path):
        pytest.importorskip("huggingface_hub")
        model = timm.create_model("effnet_fast_b0", num_classes=3, in_chans=1, drop_rate=0.5)
        save_for_hf(model, tmp_path, safe_serialization=True)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
        assert same_state(model, again)


class TestFeatures:
    def test_encoder(self):
        model = timm.create_model(
            "effnet_fast_b0", features_only=True, out_indices=(2, 4), drop_rate=0.1, num_classes=3
        )
        assert type(model) is EfficientNetFeatures
        assert [tuple(m.shape[1:]) for m in model(images())] == [(40, 8, 8), (320, 2, 2)]
        assert model.feature_info.get_dicts(keys=["num_chs", "reduction"]) == [
            {"num_chs": 40, "reduction": 8},
            {"num_chs": 320, "reduction": 32},
        ]
        assert "classifier" not in model.pretrained_cfg

    @pytest.mark.parametrize("wrapper", WRAPPERS)
    def test_wrappers(self, wrapper):
        torch.manual_seed(1)
        model = timm.create_model(
            "effnet_fast_b0", features_only=True, feature_cls=wrapper, out_indices=(1, 3)
        ).eval()
        torch.manual_seed(1)
        whole = effnet_fast.efficientnet_b0(stochastic_depth_prob=0.0).eval()
        assert model.feature_info.channels() == [24, 112]
        x = images()
        with torch.no_grad():
            maps = model(x)
            maps = list(maps.values()) if isinstance(maps, dict) else maps
            expected = whole.forward_intermediates(x, [1, 3], intermediates_only=True)
        torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-4)

    def test_timms_getter_takes_any_network(self):
        model, x = ours(), images(side=RESOLUTION)
        with torch.no_grad():
            expected = model.forward_intermediates(x, [-1, 1], intermediates_only=True)
            getter = FeatureGetterNet(model, out_indices=[-1, 1])
            assert all(map(torch.equal, getter(x), expected))
        assert getter.feature_info.channels() == [24, 320]
        assert len(model.features) == 8
        assert isinstance(model.get_classifier(), torch.nn.Identity)


class TestPruning:
    def tiny(self) -> EfficientNet:
        model = EfficientNet(TINY)
        model.load_state_dict(calibrated_state(TINY))
        model.plan = False  # block by block, to the bit
        return model.eval()

    @pytest.mark.parametrize("indices", [[0], [1], [2, 3], 1, [0, -1]], ids=str)
    def test_the_last_map_is_what_is_left(self, indices):
        model, x = self.tiny(), images(side=48)
        with torch.no_grad():
            expected = model.forward_intermediates(x, indices, intermediates_only=True)
            places = model.prune_intermediate_layers(indices)
            found = model.forward_intermediates(x, places, intermediates_only=True)
            assert all(map(torch.equal, found, expected))
            assert torch.equal(model.forward_features(x), expected[-1])
            torch.testing.assert_close(model(x), expected[-1], rtol=1e-4, atol=1e-5)
            assert model.num_features == model.head_hidden_size == expected[-1].shape[1]
            model.reset_classifier(3, "avg")
            assert model(x).shape == (2, 3)

    def test_training_goes_on(self):
        model = self.tiny().train()
        model.prune_intermediate_layers([2])
        model(images(side=48)).mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        assert len(model.freeze().param_groups(1e-3)) == 0

    def test_head_may_stay(self):
        model = self.tiny()
        before = dict(model.named_modules())
        assert model.prune_intermediate_layers([4], prune_head=False) == [4]
        assert dict(model.named_modules()) == before
        model.prune_intermediate_layers([4], prune_head=False, prune_norm=True)
        assert (len(model.features), model.num_classes) == (8, 0)

    def test_extra_blocks_count_every_stage(self):
        model = self.tiny()
        assert model.prune_intermediate_layers([5], extra_blocks=True) == [5]
        assert len(model.features) == 6

    def test_maps_that_are_gone(self):
        model = self.tiny()
        model.prune_intermediate_layers([1])
        for call in (
            model.prune_intermediate_layers,
            lambda i: model.forward_intermediates(images(), i),
        ):
            with pytest.raises(
                IndexError, match=r"feature map 4 comes from features\.7, and 3 child"
            ):
                call(1)
        with pytest.raises(IndexError, match="out of range"):
            model.prune_intermediate_layers([5])
