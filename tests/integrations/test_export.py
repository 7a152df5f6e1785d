"""Exported files: what they compute, what they say, where they run, and that no wrong one stays."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from effnet_fast import EfficientNet, deploy
from effnet_fast.integrations import export as exporting
from effnet_fast.integrations.export import CLASSES, MODEL, TRANSFORM, ExportError, export
from effnet_fast.models import EfficientNetFeatures
from effnet_fast.pretrained.images import ImageClassification
from networks import MINI, Pair, assert_alike, calibrated_state, pair, random_images

X = random_images(3, 32, seed=4)
NAMES = tuple(f"class {i} ä" for i in range(1000))
pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def models() -> Pair:
    return pair(MINI)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which a file stands already."""
    for kind in exporting.KINDS.values():
        (tmp_path / f"network{kind}").write_bytes(b"old")
    return tmp_path


def load(path: Path, entries: dict[str, str] | None = None) -> nn.Module:
    return torch.export.load(path, extra_files=entries).module()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert_alike({"y": actual.detach()}, {"y": expected.detach()})


class TestTorch:
    @pytest.mark.slow
    def test_computes_the_same_and_tells_of_itself(self, models: Pair, tmp_path: Path) -> None:
        path = tmp_path / "network.pt2"
        preset = ImageClassification(crop_size=32, resize_size=[40, 40], interpolation="bicubic")
        before = copy.deepcopy(models.actual.state_dict())
        done = export(models.actual, path, preset=preset, class_names=NAMES)
        assert (done.kind, done.resolution, done.batch) == ("torch", 32, None)
        assert done.bytes == path.stat().st_size
        assert done.error is not None
        assert done.error <= done.allowed < 0.01
        entries = dict.fromkeys((MODEL, CLASSES, TRANSFORM), "")
        module = load(path, entries)
        for batch in (1, 3):
            assert_close(module(X[:batch]), models.stock(X[:batch]))
        assert entries[MODEL] == "efficientnet_mini"
        assert tuple(json.loads(entries[CLASSES])) == NAMES
        again = ImageClassification(**json.loads(entries[TRANSFORM]))
        assert repr(again) == repr(preset)
        export(models.actual, path, preset=preset, resolution=48)
        load(path, entries)
        at_48 = json.loads(entries[TRANSFORM])
        assert (at_48["crop_size"], at_48["resize_size"]) == (48, [60, 60])
        assert not models.actual.training
        assert all(p.requires_grad for p in models.actual.parameters())
        for name, tensor in models.actual.state_dict().items():
            assert torch.equal(tensor, before[name])

    @pytest.mark.slow
    def test_transform_and_names_are_the_networks_own(self, tmp_path: Path) -> None:
        model = EfficientNet(MINI, num_classes=2).eval()
        model.class_names = ["cat", "dog"]
        export(model, tmp_path / "network.pt2", batch=1)
        entries = dict.fromkeys((CLASSES, TRANSFORM), "")
        load(tmp_path / "network.pt2", entries)
        assert json.loads(entries[CLASSES]) == ["cat", "dog"]
        own = json.loads(entries[TRANSFORM])
        assert (own["crop_size"], own["resize_size"]) == (MINI.crop, MINI.resize)
        assert (tuple(own["mean"]), own["interpolation"]) == (MINI.mean, MINI.interpolation)

    @pytest.mark.slow
    def test_fixed_batch(self, models: Pair, tmp_path: Path) -> None:
        path = tmp_path / "network.pt2"
        assert export(models.actual, path, batch=2, resolution=32).batch == 2
        module = load(path)
        assert_close(module(X[:2]), models.stock(X[:2]))
        with pytest.raises(Exception, match=r"size\(\)\[0\] == 2"):
            module(X)

    @pytest.mark.slow
    def test_encoder_and_pooled_features(self, models: Pair, tmp_path: Path) -> None:
        encoder = EfficientNetFeatures(MINI, out_indices=(1, 2)).eval()
        encoder.load_state_dict(calibrated_state(MINI))
        export(encoder, tmp_path / "maps.pt2", resolution=32)
        for actual, expected in zip(load(tmp_path / "maps.pt2")(X), encoder(X), strict=True):
            assert_close(actual, expected)
        pooled = copy.deepcopy(models.actual)
        pooled.reset_classifier(0)
        export(pooled, tmp_path / "pooled.pt2", resolution=32)
        assert_close(load(tmp_path / "pooled.pt2")(X), pooled(X))

    @pytest.mark.slow
    def test_runs_without_this_package(self, models: Pair, tmp_path: Path) -> None:
        path = tmp_path / "network.pt2"
        export(models.actual, path, resolution=32)
        torch.save(X, tmp_path / "x.pt")
        script = (
            "import sys, torch; sys.modules['effnet_fast'] = None\n"
            "module = torch.export.load(sys.argv[1]).module()\n"
            "torch.save(module(torch.load(sys.argv[2])), sys.argv[3])\n"
        )
        files = [str(path), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
        subprocess.run([sys.executable, "-c", script, *files], check=True, cwd=tmp_path)
        assert_close(torch.load(tmp_path / "y.pt"), models.stock(X))


class TestOnnx:
    @pytest.mark.slow
    def test_computes_the_same_and_tells_of_itself(self, models: Pair, tmp_path: Path) -> None:
        import onnx
        import onnxruntime

        path = tmp_path / "network.onnx"
        done = export(models.actual, path, class_names=NAMES, resolution=32)
        assert done.checked_by == f"onnxruntime {onnxruntime.__version__}"
        assert [p.name for p in tmp_path.iterdir()] == [path.name]  # weights are in it
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for batch in (1, 3):
            (y,) = session.run(None, {"images": X[:batch].numpy()})
            assert_close(torch.from_numpy(y), models.stock(X[:batch]))
        entries = session.get_modelmeta().custom_metadata_map
        assert tuple(json.loads(entries[CLASSES])) == NAMES
        assert json.loads(entries[TRANSFORM])["crop_size"] == 32
        graph = onnx.load(path)
        assert {node.domain for node in graph.graph.node} == {""}
        assert not graph.functions

    @pytest.mark.slow
    def test_without_onnxruntime_it_is_only_read(
        self, models: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        done = export(models.actual, tmp_path / "network.onnx", batch=1, resolution=32)
        assert (done.checked_by, done.error) == (None, None)
        assert done.bytes > 1000

    @pytest.mark.parametrize("name", exporting.ONNX_PACKAGES)
    def test_needs_packages(
        self, models: Pair, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setitem(sys.modules, name, None)
        message = rf'{name} is missing: pip install "effnet-fast\[onnx\]"'
        with pytest.raises(ImportError, match=message):
            export(models.actual, folder / "network.onnx")
        assert (folder / "network.onnx").read_bytes() == b"old"

    def test_refuses_weights_beyond_one_file(
        self, models: Pair, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(exporting, "LARGEST_ONNX", 1000)
        with pytest.raises(ValueError, match="one ONNX file holds at most 1000: export to torch"):
            export(models.actual, folder / "network.onnx")


def swap_channels(network: nn.Module) -> None:
    weight = network.features[0][0].weight
    weight[[0, 1]] = weight[[1, 0]].clone()


def forget_the_head(network: nn.Module) -> None:
    network.classifier = nn.Identity()


def lose_precision(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.copy_(parameter.bfloat16())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (swap_channels, r"off by \S+ \(rms\), and \S+ is allowed; the file is not kept"),
        (lose_precision, "is allowed; the file is not kept"),
        (forget_the_head, r"shapes \[\[3, \d+\]\], the network's \[\[3, 1000\]\]"),
    ],
)
def test_no_wrong_file_stays(
    models: Pair,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: object,
    message: str,
) -> None:
    """The exporter gets another network than the one that is compared."""
    capture = exporting._capture

    def capture_wrong(network: nn.Module, x: Tensor, dynamic: bool) -> object:
        wrong = copy.deepcopy(network)
        with torch.no_grad():
            spoil(wrong)
        return capture(wrong, x, dynamic)

    monkeypatch.setattr(exporting, "_capture", capture_wrong)
    path = folder / "network.pt2"
    before = sorted(folder.iterdir())
    with pytest.raises(ExportError, match=message):
        export(models.actual, path, resolution=32)
    assert path.read_bytes() == b"old"
    assert sorted(folder.iterdir()) == before


@pytest.mark.slow
def test_untrained_networks_are_exported(tmp_path: Path) -> None:
    """Their images hardly differ in the logits: rounding alone sets what is allowed."""
    torch.manual_seed(1)
    done = export(EfficientNet(MINI, num_classes=3).eval(), tmp_path / "n.pt2", resolution=32)
    assert done.error <= done.allowed


@pytest.mark.parametrize(
    ("make", "name", "options", "error", "message"),
    [
        (lambda m: m, "n.pt", {}, ValueError, "n.pt: the suffix must be .onnx or .pt2"),
        (lambda m: m, "n.pt2", {"to": "onnx"}, ValueError, "a file for onnx must be .onnx"),
        (lambda m: m, "n.pt2", {"to": "tflite"}, ValueError, "to must be one of onnx, torch"),
        (lambda m: m, "n.pt2", {"batch": 0}, ValueError, "batch must be an int of at least 1"),
        (lambda m: m, "n.pt2", {"resolution": 0}, ValueError, "resolution must be an int"),
        (lambda m: m, "n.pt2", {"class_names": ["a"]}, ValueError, "1 class names were given"),
        (lambda m: copy.deepcopy(m).train(), "n.pt2", {}, ValueError, "is in training mode"),
        (lambda m: copy.deepcopy(m).bfloat16(), "n.pt2", {}, ValueError, "got torch.bfloat16"),
        (lambda m: nn.Linear(2, 2), "n.pt2", {}, TypeError, "got Linear"),
        (deploy, "n.pt2", {}, TypeError, "as the one it was made of"),
        (lambda m: m, "no/n.pt2", {}, FileNotFoundError, "No such file"),
    ],
)
def test_bad_input(models, tmp_path, make, name, options, error, message) -> None:
    with pytest.raises(error, match=message):
        export(make(models.actual), tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []
