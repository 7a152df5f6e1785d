"""Published weights: torchvision's enums, and networks that are wholly loaded or not at all."""

import copy
import dataclasses
import hashlib
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import effnet_fast
from effnet_fast.models.input_channels import adapt_input_channels
from effnet_fast.models.published import load_published
from effnet_fast.models.variants import VARIANTS
from effnet_fast.pretrained import weights
from effnet_fast.pretrained.weights import EfficientNet_B0_Weights, EfficientNet_B1_Weights
from effnet_fast.scaling import count
from networks import PUBLISHED

NETWORKS = [f"efficientnet_{name}" for name in PUBLISHED]
MEMBERS = [member for enum in weights.ENUMS.values() for member in enum if not member.package]
B0 = EfficientNet_B0_Weights.IMAGENET1K_V1
STEM = "features.0.0.weight"


def theirs(member):
    return torchvision.models.get_weight(str(member))


def same_tensors(actual, expected):
    assert list(actual) == list(expected)
    return all(torch.equal(actual[key], expected[key]) for key in expected)


def cached_file():
    (path,) = (Path(os.environ["TORCH_HOME"]) / "hub" / "checkpoints").iterdir()
    return path


class TestEnums:
    @pytest.mark.parametrize("network", NETWORKS)
    def test_members_are_torchvisions(self, network):
        ours, their = weights.ENUMS[network], torchvision.models.get_model_weights(network)
        assert ours.__name__ == their.__name__
        assert list(ours.__members__) == list(their.__members__)
        assert ours.DEFAULT.name == their.DEFAULT.name
        assert getattr(effnet_fast, ours.__name__) is ours

    @pytest.mark.parametrize("member", MEMBERS, ids=str)
    def test_facts_are_torchvisions(self, member):
        expected = theirs(member)
        assert member.url == expected.url
        meta = {key: value for key, value in expected.meta.items() if key != "_docs"}
        assert member.meta == meta
        assert len(member.meta["categories"]) == 1000

    @pytest.mark.parametrize("member", MEMBERS, ids=str)
    def test_transforms_are_torchvisions(self, member):
        ours, expected = member.transforms(), theirs(member).transforms()
        for name in ("crop_size", "resize_size", "mean", "std", "antialias"):
            assert getattr(ours, name) == getattr(expected, name)
        assert ours.interpolation == expected.interpolation.value

    @pytest.mark.parametrize("member", MEMBERS, ids=str)
    def test_facts_are_the_networks(self, member):
        variant = VARIANTS[type(member).__name__[13:].removesuffix("_Weights").lower()]
        assert member.meta["num_params"] == count(variant).parameters
        if member.name == "IMAGENET1K_V1":
            preset = (variant.crop, variant.resize, variant.interpolation)
            keywords = member.transforms.keywords
            assert tuple(keywords[k] for k in ("crop_size", "resize_size", "interpolation")) == (
                preset
            )

    def test_transforms_take_other_arguments(self):
        preset = B0.transforms(crop_size=100, antialias=None)
        assert (preset.crop_size, preset.resize_size) == ([100], [256])
        assert preset.antialias is None

    @pytest.mark.parametrize("member", MEMBERS, ids=str)
    def test_pickle_and_copies_are_the_member(self, member):
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            content = pickle.dumps(member, protocol)
            assert pickle.loads(content) is member
            assert len(content) < 200
        assert copy.copy(member) is copy.deepcopy(member) is member
        assert copy.deepcopy(member.value) == member.value
        assert member.value != dataclasses.replace(member.value, url="")

    def test_values_differ(self):
        values = [member.value for member in MEMBERS]
        assert all((a == b) == (a is b) for a in values for b in values)

    @pytest.mark.slow
    def test_pickle_is_read_by_another_process(self):
        script = "import pickle, sys; print(pickle.load(sys.stdin.buffer))"
        output = subprocess.run(
            [sys.executable, "-c", script],
            input=pickle.dumps(EfficientNet_B1_Weights.DEFAULT),
            capture_output=True,
            check=True,
        ).stdout
        assert output == b"EfficientNet_B1_Weights.IMAGENET1K_V2\n"

    def test_repr(self):
        assert repr(EfficientNet_B1_Weights.DEFAULT) == "EfficientNet_B1_Weights.IMAGENET1K_V2"


class TestLookup:
    @pytest.mark.parametrize(
        "given",
        [
            "IMAGENET1K_V1",
            "DEFAULT",
            "EfficientNet_B0_Weights.IMAGENET1K_V1",
            "EfficientNet_B0_Weights.DEFAULT",
            B0,
            torchvision.models.EfficientNet_B0_Weights.DEFAULT,
        ],
        ids=repr,
    )
    def test_verify(self, given):
        assert EfficientNet_B0_Weights.verify(given) is B0

    def test_verify_none(self):
        assert EfficientNet_B0_Weights.verify(None) is None

    @pytest.mark.parametrize("name", ["IMAGENET1K_V2", "default", "", "EfficientNet_B1_Weights.X"])
    @pytest.mark.parametrize("error", [KeyError, ValueError])
    def test_verify_refuses_unknown_names(self, name, error):
        message = rf"EfficientNet_B0_Weights has no member '{name}'; allowed are IMAGENET1K_V1, DEF"
        with pytest.raises(error, match=message):
            EfficientNet_B0_Weights.verify(name)

    @pytest.mark.parametrize(
        ("given", "named"),
        [
            (EfficientNet_B1_Weights.IMAGENET1K_V1, r"EfficientNet_B1_Weights\.IMAGENET1K_V1"),
            (torchvision.models.ResNet18_Weights.DEFAULT, r"ResNet18_Weights\.IMAGENET1K_V1"),
            (True, "bool"),
            (3, "int"),
            (Path("a.pth"), "PosixPath"),
        ],
    )
    def test_verify_refuses_other_things_by_name(self, given, named):
        with pytest.raises(
            TypeError, match=f"expected EfficientNet_B0_Weights but received {named}"
        ):
            EfficientNet_B0_Weights.verify(given)

    def test_get_weight(self):
        assert effnet_fast.get_weight("EfficientNet_B0_Weights.DEFAULT") is B0

    @pytest.mark.parametrize(
        "name", ["DEFAULT", "ResNet18_Weights.DEFAULT", "EfficientNet_B0_Weights.X", "a.b.c", ""]
    )
    def test_get_weight_refuses_what_torchvision_refuses(self, name):
        with pytest.raises(ValueError, match=r"no weights; allowed|no member"):
            effnet_fast.get_weight(name)

    def test_get_model_weights(self):
        for given in ("efficientnet_b0", "EfficientNet_B0", effnet_fast.efficientnet_b0):
            assert effnet_fast.get_model_weights(given) is EfficientNet_B0_Weights

    @pytest.mark.parametrize("given", ["b0", "resnet18", effnet_fast.efficientnet_b8, 3])
    def test_get_model_weights_refuses_others(self, given):
        with pytest.raises(ValueError, match="has no published weights; those that have are effic"):
            effnet_fast.get_model_weights(given)


class TestNetworks:
    @pytest.mark.slow
    @pytest.mark.parametrize("given", [B0, "DEFAULT", "EfficientNet_B0_Weights.IMAGENET1K_V1"])
    def test_loads_everything(self, published, b0_state, given):
        model = effnet_fast.efficientnet_b0(weights=given, progress=False)
        assert same_tensors(model.state_dict(), b0_state)
        assert model.training

    @pytest.mark.slow
    def test_gives_torchvisions_logits(self, published, monkeypatch):
        url = B0.url
        monkeypatch.setattr(theirs(B0).value, "url", url)
        expected = torchvision.models.efficientnet_b0(weights=theirs(B0), progress=False)
        assert published.asked == [None]
        actual = effnet_fast.efficientnet_b0(weights=B0)
        assert published.asked == [None]  # torchvision's cache was read
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        actual, expected = (model.double().eval()(x) for model in (actual, expected))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
        assert (expected[0] - expected[1]).abs().max() > 1e-3

    @pytest.mark.slow
    def test_torchvision_reads_our_cache(self, published, b0_state, monkeypatch):
        effnet_fast.efficientnet_b0(weights=B0, progress=False)
        monkeypatch.setattr(theirs(B0).value, "url", B0.url)
        model = torchvision.models.efficientnet_b0(weights="DEFAULT")
        assert published.asked == [None]
        assert same_tensors(model.state_dict(), b0_state)

    @pytest.mark.slow
    def test_draws_as_without_weights(self, published):
        states = []
        for given in (None, B0):
            torch.manual_seed(0)
            effnet_fast.efficientnet_b0(weights=given, progress=False)
            states.append(torch.get_rng_state())
        assert torch.equal(*states)

    @pytest.mark.slow
    @pytest.mark.parametrize("progress", [True, False])
    def test_progress(self, published, capsys, progress):
        effnet_fast.efficientnet_b0(weights=B0, progress=progress)
        assert ("efficientnet_b0_stand-in" in capsys.readouterr().err) == progress

    @pytest.mark.slow
    @pytest.mark.parametrize("in_chans", [1, 2, 4, 6])
    def test_adapts_the_stem(self, published, b0_state, in_chans):
        model = effnet_fast.efficientnet_b0(weights=B0, in_chans=in_chans, progress=False)
        stem = adapt_input_channels(b0_state[STEM], in_chans)
        assert stem.shape[1] == in_chans
        assert same_tensors(model.state_dict(), {**b0_state, STEM: stem})

    @pytest.mark.slow
    @pytest.mark.parametrize("stages", [9, 8, 4])
    def test_a_network_that_ends_early_does_without_the_rest(self, published, b0_state, stages):
        model = effnet_fast.efficientnet_b0()
        del model.classifier
        del model.features[stages:]
        load_published(model, B0, in_chans=3, progress=False)
        kept = tuple(f"features.{i}." for i in range(stages))
        rest = {key: value for key, value in b0_state.items() if key.startswith(kept)}
        assert same_tensors(model.state_dict(), rest)

    @pytest.mark.slow
    @pytest.mark.parametrize("out_indices", [(0, 1, 2, 3, 4), (1, 2)], ids=str)
    def test_encoders_take_what_they_have(self, published, b0_state, out_indices):
        model = effnet_fast.efficientnet_b0(
            weights=B0, features_only=True, out_indices=out_indices, in_chans=1, progress=False
        )
        state = {**b0_state, STEM: adapt_input_channels(b0_state[STEM], 1)}
        kept = model.state_dict()
        assert same_tensors(kept, {key: state[key] for key in kept})
        assert max(kept) < f"features.{(2, 3, 4, 6, 8)[out_indices[-1]]}"

    def test_no_classifier(self, published, b0_state):
        options = {"num_classes": 0, "global_pool": "catavgmax"}
        model = effnet_fast.efficientnet_b0(weights=B0, progress=False, **options).eval()
        assert same_tensors(
            model.features.state_dict(),
            {key.removeprefix("features."): t for key, t in b0_state.items() if "features" in key},
        )
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 2560)

    def test_keeps_the_other_options(self, published, b0_state):
        options = {"dropout": 0.0, "stochastic_depth_prob": 0.5, "backend": "reference"}
        model = effnet_fast.efficientnet_b0(
            weights=B0, num_classes=1000, progress=False, memory="lean", **options
        )
        assert (model.classifier[0].p, model.backend, model.memory) == (0.0, "reference", "lean")
        assert same_tensors(model.state_dict(), b0_state)

    @pytest.mark.parametrize("num_classes", [10, 999, 1, 1001])
    def test_refuses_another_number_of_classes(self, published, num_classes):
        message = (
            f"'num_classes' expected value 1000 but got {num_classes} instead: {B0!r} has 1000"
        )
        with pytest.raises(ValueError, match=message):
            effnet_fast.efficientnet_b0(weights=B0, num_classes=num_classes)
        assert published.asked == []

    @pytest.mark.parametrize("weights", [B0, "IMAGENET1K_V1", "EfficientNet_B0_Weights.DEFAULT"])
    def test_refuses_another_number_of_classes_of_named_weights(self, weights):
        with pytest.raises(ValueError, match="'num_classes' expected value 1000 but got 2"):
            effnet_fast.efficientnet_b0(weights=weights, num_classes=2)

    @pytest.mark.parametrize("in_chans", [3, 1])
    def test_default_weights_with_another_classifier(self, published, b0_state, in_chans):
        torch.manual_seed(5)
        model = effnet_fast.efficientnet_b0(
            weights="DEFAULT", num_classes=2, in_chans=in_chans, progress=False
        )
        torch.manual_seed(5)
        fresh = effnet_fast.efficientnet_b0(num_classes=2, in_chans=in_chans)
        expected = {**b0_state, STEM: adapt_input_channels(b0_state[STEM], in_chans)}
        own = fresh.classifier.state_dict(prefix="classifier.")
        assert same_tensors(model.state_dict(), {**expected, **own})

    @pytest.mark.parametrize("network", ["efficientnet_b8", "efficientnet_l2"])
    def test_refuses_networks_without_weights(self, network):
        message = f"weights must be None, got 'DEFAULT': {network} has no published weights"
        with pytest.raises(ValueError, match=message):
            getattr(effnet_fast, network)(weights="DEFAULT")

    def test_refuses_weights_of_another_network(self):
        with pytest.raises(TypeError, match="expected EfficientNet_B0_Weights but received Effic"):
            effnet_fast.efficientnet_b0(weights=EfficientNet_B1_Weights.DEFAULT)


class TestFiles:
    @pytest.mark.slow
    def test_checks_the_cached_file_every_time(self, published, b0_file):
        for _ in range(2):
            B0.get_state_dict(progress=False)
        path = cached_file()
        tampered = bytearray(b0_file)
        tampered[len(tampered) // 2] ^= 1
        path.write_bytes(tampered)
        for check_hash in (True, False):
            with pytest.raises(ValueError, match="move or delete it to have it down") as caught:
                B0.get_state_dict(progress=False, check_hash=check_hash)
            assert str(path) in str(caught.value)
            assert hashlib.sha256(tampered).hexdigest() in str(caught.value)
        with pytest.raises(ValueError, match=path.name):
            effnet_fast.efficientnet_b0(weights="DEFAULT")
        assert path.read_bytes() == tampered
        assert published.asked == [None]

    def test_refuses_a_truncated_download(self, published, b0_file):
        published.content = b0_file[: len(b0_file) // 2]
        with pytest.raises(ValueError, match="It was removed"):
            effnet_fast.efficientnet_b0(weights="DEFAULT", progress=False)
        assert list((Path(os.environ["TORCH_HOME"]) / "hub" / "checkpoints").iterdir()) == []

    def test_takes_a_folder_and_a_device(self, published, b0_state, tmp_path):
        state = B0.get_state_dict(tmp_path / "folder", "meta", progress=False)
        assert all(tensor.is_meta for tensor in state.values())
        assert list(state) == list(b0_state)
        assert [path.name for path in (tmp_path / "folder").iterdir()] == [B0.url.split("/")[-1]]

    def test_follows_torch_hubs_folder(self, published, tmp_path, monkeypatch):
        monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
        B0.get_state_dict(progress=False)
        assert len(list((tmp_path / "hub" / "checkpoints").iterdir())) == 1

    def test_executes_nothing(self, published, tmp_path, monkeypatch):
        marker = tmp_path / "executed"

        class Attack:
            def __reduce__(self):
                return open, (str(marker), "w")

        buffer = io.BytesIO()
        torch.save({STEM: Attack()}, buffer)
        published.content = buffer.getvalue()
        monkeypatch.setattr(B0.value, "url", published.url("attack"))
        with pytest.raises(ValueError, match="not a file of plain tensors"):
            effnet_fast.efficientnet_b0(weights=B0, progress=False)
        assert not marker.exists()

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda state: state.pop("classifier.1.bias"), r"1 missing \(classifier\.1\.bias\)"),
            (lambda state: state.update(extra=torch.ones(1)), r"1 unexpected \(extra\)"),
            (
                lambda state: state.update({STEM: torch.ones(8, 3, 3, 3)}),
                r"1 of another shape \(features\.0\.0\.weight \(8, 3, 3, 3\) instead of \(32, ",
            ),
        ],
        ids=["missing", "unexpected", "shape"],
    )
    def test_loads_nothing_when_something_does_not_fit(
        self, published, b0_state, monkeypatch, spoil, message
    ):
        state = dict(b0_state)
        spoil(state)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        published.content = buffer.getvalue()
        monkeypatch.setattr(B0.value, "url", published.url("spoilt"))
        model = effnet_fast.efficientnet_b0()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=rf"{B0!r}: weights do not fit the model: {message}"):
            load_published(model, B0, in_chans=3, progress=False)
        assert same_tensors(model.state_dict(), before)
