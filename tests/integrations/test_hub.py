"""Networks in folders in the layout of the Hugging Face Hub, and entry points of torch.hub."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

import effnet_fast
from effnet_fast.models import VARIANTS, EfficientNet, Stage
from effnet_fast.modules.layers import Sequential
from networks import TINY, TINY_V2

ROOT = Path(__file__).parents[2]
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def tiny(**options: object) -> EfficientNet:
    return EfficientNet(TINY, num_classes=4, **options).eval()


def assert_same(again: EfficientNet, model: EfficientNet) -> None:
    assert repr(again) == repr(model)
    assert again.variant == model.variant
    assert again._origin == model._origin
    state, other = model.state_dict(), again.state_dict()
    assert list(state) == list(other)
    assert all(state[k].dtype == other[k].dtype and state[k].equal(other[k]) for k in state)
    for name in ("num_classes", "in_chans", "global_pool", "memory", "stochastic_depth_prob"):
        assert getattr(again, name) == getattr(model, name), name


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "build",
    [
        tiny,
        lambda: EfficientNet(TINY_V2, num_classes=0, global_pool="", in_chans=1),
        lambda: tiny(
            dropout=0.4, stochastic_depth_prob=0.1, global_pool="catavgmax", memory="lean"
        ),
        lambda: tiny().to(torch.bfloat16),
        lambda: EfficientNet(replace(TINY, padding="same", bn_eps=1e-3, activation="relu6")),
        lambda: EfficientNet(replace(TINY, squeeze=False, fixed_ends=True, head=32, mean=(0.1,))),
        lambda: effnet_fast.efficientnet(
            width=0.5, stages=(Stage(1, 3, 1, 32, 16, 1), Stage(6, 5, 2, 16, 24, 2, "fused"))
        ),
        lambda: effnet_fast.efficientnet_b0(num_classes=2),
    ],
    ids=["tiny", "v2", "options", "bf16", "same", "lite", "custom", "b0"],
)
def test_a_network_comes_back(build, tmp_path):
    model = build().eval()
    model.save_pretrained(tmp_path / "new")
    again = EfficientNet.from_pretrained(tmp_path / "new")
    assert_same(again, model)
    assert not again.training
    assert all(p.requires_grad for p in again.parameters())
    x = torch.randn(1, model.in_chans, 48, 48, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [CONFIG, WEIGHTS]


def test_a_replaced_classifier_comes_back(tmp_path):
    model = tiny()
    model.classifier = nn.Sequential(nn.Dropout(0.3), nn.Linear(model.num_features, 9))
    model.save_pretrained(tmp_path)
    again = EfficientNet.from_pretrained(tmp_path)
    assert (again.num_classes, again.classifier[0].p) == (9, 0.3)
    assert torch.equal(again.classifier[1].weight, model.classifier[1].weight)


def test_the_family_of_a_checkpoint_is_remembered(tmp_path):
    state = EfficientNet("b0", num_classes=3).state_dict()
    converted = effnet_fast.checkpoints.convert(state, to="timm")
    effnet_fast.checkpoints.save(converted, tmp_path / "tf_efficientnet_b0.safetensors")
    model = EfficientNet.from_checkpoint(tmp_path / "tf_efficientnet_b0.safetensors").eval()
    model.save_pretrained(tmp_path)
    again = EfficientNet.from_pretrained(tmp_path)
    assert_same(again, model)
    assert again.variant.padding == "same"
    assert dict(again._origin)["effnet_fast.family"] == "timm_tf"


def test_class_names(tmp_path):
    names = ["cat", "dog", "Katze", "犬"]
    tiny().save_pretrained(tmp_path, class_names=names)
    model = EfficientNet.from_pretrained(tmp_path)
    assert model.class_names == tuple(names)
    model.save_pretrained(tmp_path / "again")
    assert EfficientNet.from_pretrained(tmp_path / "again").class_names == tuple(names)
    for wrong in (names[:3], "cats", [1, 2, 3, 4]):
        with pytest.raises(ValueError, match="class_names"):
            tiny().save_pretrained(tmp_path, class_names=wrong)


def test_how_to_run_it_may_be_given(folder):
    model = EfficientNet.from_pretrained(str(folder), backend="reference", memory="lean")
    assert (model.backend, model.memory) == ("reference", "lean")
    with pytest.raises(TypeError, match="takes backend and memory as options, got num_classes"):
        EfficientNet.from_pretrained(folder, num_classes=3)


def _pruned(model):
    model.prune_intermediate_layers([1])


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "avgpool", nn.AdaptiveMaxPool2d(1)),
        lambda m: setattr(m.features[0], "2", nn.ReLU()),
        lambda m: setattr(m.features[1][0].stochastic_depth, "p", 0.7),
        lambda m: setattr(m.features[0][1], "eps", 0.1),
        lambda m: m.classifier.append(nn.ReLU()),
        lambda m: m.features.append(Sequential()),
        lambda m: m.features[0][0].register_parameter("extra", nn.Parameter(torch.ones(1))),
        _pruned,
    ],
    ids=["pool", "activation", "drop-path", "eps", "classifier", "stage", "parameter", "pruned"],
)
def test_what_no_config_describes_is_refused(change, tmp_path):
    model = tiny()
    change(model)
    with pytest.raises(ValueError, match=r"cannot describe this network|do not fit the model"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_custom_norm_is_refused(tmp_path):
    model = tiny(norm_layer=lambda channels: nn.GroupNorm(1, channels))
    with pytest.raises(ValueError, match="GroupNorm"):
        model.save_pretrained(tmp_path)


class TestBadConfigs:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c.pop("format"), "format is None; this version reads 1"),
            (lambda c: c.update(format=2), "format is 2"),
            (lambda c: c.update(library_name="timm"), "library_name is 'timm'"),
            (lambda c: c.pop("dropout"), "dropout is missing"),
            (lambda c: c.update(extra=1), "extra is unknown"),
            (lambda c: c.update(num_classes=5), "classifier"),
            (lambda c: c.update(num_classes=True), "num_classes must be an integer"),
            (lambda c: c.update(num_classes="4"), "num_classes must be an integer"),
            (lambda c: c.update(in_chans=0), "in_chans must be an integer of at least 1"),
            (lambda c: c.update(global_pool="median"), "global_pool must be one of"),
            (lambda c: c.update(memory="much"), "memory must be one of"),
            (lambda c: c.update(stochastic_depth_prob=1.5), "stochastic_depth_prob must be a num"),
            (lambda c: c.update(architecture="efficientnet_b0"), "but variant has other entries"),
            (lambda c: c.update(origin={"effnet_fast.family": "x"}), "family is unknown: 'x'"),
            (lambda c: c.update(origin=[]), "origin must be an object"),
            (lambda c: c.update(label_names=["a"]), "label_names has 1 names for 4 classes"),
            (lambda c: c.update(variant="b0"), "variant must be an object"),
            (lambda c: c["variant"].pop("crop"), "variant.crop is missing"),
            (lambda c: c["variant"].update(width=-1), "variant.width must be a number"),
            (lambda c: c["variant"].update(width=0), "variant.width must be above 0"),
            (lambda c: c["variant"].update(depth=9999), "has more weights"),
            (lambda c: c["variant"].update(depth=1.0), "missing"),
            (lambda c: c["variant"].update(padding="big"), "padding must be one of"),
            (lambda c: c["variant"].update(activation="tanh"), "activation must be one of"),
            (lambda c: c["variant"].update(squeeze=1), "variant.squeeze must be true or false"),
            (lambda c: c["variant"].update(mean=[None]), "variant.mean must be a number"),
            (lambda c: c["variant"].update(bn_eps=float("nan")), "variant.bn_eps must be a number"),
            (lambda c: c["variant"].update(baseline=[]), "variant.baseline must be a list"),
            (
                lambda c: c["variant"]["baseline"][2].pop("kernel"),
                r"baseline\[2\].kernel is missing",
            ),
            (lambda c: c["variant"]["baseline"][2].update(kind="x"), "kind must be one of"),
            (
                lambda c: c["variant"]["baseline"][2].update(in_channels=8),
                r"\[2\].in_channels is 8",
            ),
            (lambda c: c["variant"]["baseline"][0].update(repeats=0), "repeats must be an integer"),
        ],
    )
    def test_entries(self, folder, change, message):
        content = json.loads((folder / CONFIG).read_text("utf-8"))
        change(content)
        (folder / CONFIG).write_text(json.dumps(content), "utf-8")
        with pytest.raises(ValueError, match=message) as caught:
            EfficientNet.from_pretrained(folder)
        assert str(folder) in str(caught.value)

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "3", "[" * 100_000, '{"library_name": "effnet_fast"}'], ids=range(6)
    )
    def test_texts(self, folder, text):
        (folder / CONFIG).write_text(text, "utf-8")
        with pytest.raises(ValueError, match=r"config\.json: "):
            EfficientNet.from_pretrained(folder)

    def test_no_text(self, folder):
        (folder / CONFIG).write_bytes(b"\xff\xfe")
        with pytest.raises(ValueError, match="not UTF-8"):
            EfficientNet.from_pretrained(folder)

    @pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
    def test_missing_files(self, folder, name):
        torch.save(tiny().state_dict(), folder / "pytorch_model.bin")  # nobody reads it
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            EfficientNet.from_pretrained(folder)

    def test_weights_of_another_network(self, folder):
        safetensors.torch.save_file(EfficientNet("b0").state_dict(), folder / WEIGHTS)
        with pytest.raises(ValueError, match=r"safetensors: weights do not fit the model"):
            EfficientNet.from_pretrained(folder)

    def test_a_pickle_in_the_place_of_weights(self, folder):
        torch.save(tiny().state_dict(), folder / WEIGHTS)
        with pytest.raises(ValueError, match=WEIGHTS):
            EfficientNet.from_pretrained(folder)

    @pytest.mark.parametrize("name", ["nowhere", "./nowhere/there", "/nowhere/there", "a/b/c"])
    def test_what_is_no_folder(self, name):
        with pytest.raises(FileNotFoundError, match="neither a folder nor"):
            EfficientNet.from_pretrained(name)


class TestHub:
    def test_without_huggingface_hub(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        EfficientNet.from_pretrained(folder)
        for call in (EfficientNet.from_pretrained, tiny().push_to_hub):
            with pytest.raises(ImportError, match=r'pip install "effnet-fast\[hub\]"'):
                call("owner/name")

    def test_push_and_load(self, tmp_path, monkeypatch):
        hub = pytest.importorskip("huggingface_hub")
        calls = []

        class Api:
            def __init__(self, token):
                calls.append(("token", token))

            def create_repo(self, repo_id, private, exist_ok):
                calls.append(("create", repo_id, private, exist_ok))
                return SimpleNamespace(repo_id=f"me/{repo_id}")

            def upload_folder(self, repo_id, folder_path, commit_message, revision, create_pr):
                calls.append(("upload", repo_id, commit_message, revision, create_pr))
                for path in Path(folder_path).iterdir():
                    (tmp_path / path.name).write_bytes(path.read_bytes())
                return "https://hub/commit"

        def download(repo_id, filename, **options):
            calls.append(("download", repo_id, filename, options["revision"]))
            return str(tmp_path / filename)

        monkeypatch.setattr(hub, "HfApi", Api)
        monkeypatch.setattr(hub, "hf_hub_download", download)
        model = tiny()
        assert (
            model.push_to_hub("name", private=True, token="t", branch="b") == "https://hub/commit"
        )
        assert calls == [
            ("token", "t"),
            ("create", "name", True, True),
            ("upload", "me/name", "Push model using effnet_fast", "b", None),
        ]
        again = EfficientNet.from_pretrained("me/name", revision="b")
        assert calls[3:] == [("download", "me/name", name, "b") for name in (CONFIG, WEIGHTS)]
        assert_same(again, model)


class TestTorchHub:
    def test_every_network_has_an_entry_point(self):
        found = runpy.run_path(str(ROOT / "hubconf.py"))
        for name in (f"efficientnet_{name}" for name in VARIANTS):
            assert found[name] is getattr(effnet_fast, name)
        assert "torch" in found["dependencies"]

    def test_load(self):
        model = torch.hub.load(str(ROOT), "efficientnet_b0", source="local", num_classes=3)
        assert type(model).__name__ == "EfficientNet"
        assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3)
