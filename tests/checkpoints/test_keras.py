"""Files of Keras: three layouts, what normalises images, and Keras itself as reference."""

import json
import os
import sys
import zipfile

import numpy as np
import pytest
import torch

from effnet_fast import EfficientNet, checkpoints
from networks import TINY

h5py = pytest.importorskip("h5py", reason="h5py, by which Keras's files are read, is not installed")
LEAVES = {
    "bn": {
        "weight": "gamma",
        "bias": "beta",
        "running_mean": "moving_mean",
        "running_var": "moving_variance",
    },
    "conv": {"weight": "kernel", "bias": "bias"},
}
MEAN, VARIANCE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    state = EfficientNet("b0", num_classes=3).state_dict()
    return {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in state.items()}


def keras_layers(state):
    """Variables by layer, in Keras's layout and order."""
    layers = {}
    for key, value in checkpoints.convert(state, "keras").items():
        layer, _, leaf = key.rpartition(".")
        kind = "bn" if layer.endswith("bn") else "conv"
        if leaf not in LEAVES[kind]:
            continue
        array = value.numpy()
        if array.ndim == 4:
            array = array.transpose((2, 3, 0, 1) if layer.endswith("dwconv") else (2, 3, 1, 0))
        array = array.T if array.ndim == 2 else array
        layers.setdefault(layer, {})[LEAVES[kind][leaf]] = array
    return layers


def write_legacy(path, layers, config=None, normalised=True):
    with h5py.File(path, "w") as file:
        root = file
        if config is not None:
            file.attrs["model_config"] = json.dumps(config)
            root = file.create_group("model_weights")
        for layer, values in layers.items():
            for name, value in values.items():
                name = "depthwise_kernel" if layer.endswith("dwconv") else name
                root[f"{layer}/{layer}/{name}:0"] = value
        if normalised:
            root["normalization/normalization/mean:0"] = np.float32(MEAN)
            root["normalization/normalization/variance:0"] = np.float32(VARIANCE)
            root["normalization/normalization/count:0"] = np.int64(0)
    return path


def write_numbered(target, layers):
    counts = {}
    with h5py.File(target, "w") as file:
        for layer, values in layers.items():
            kind = "batch_normalization" if layer.endswith("bn") else "conv2d"
            number = counts[kind] = counts.get(kind, -1) + 1
            group = file.create_group(f"layers/{kind}{f'_{number}' if number else ''}/vars")
            group.attrs["name"] = layer
            for i, value in enumerate(values.values()):
                group[str(i)] = value
        group = file.create_group("layers/normalization/vars")
        group.attrs["name"] = "normalization"
        group["0"], group["1"], group["2"] = np.float32(MEAN), np.float32([0.04] * 3), 0


CONFIG = {
    "config": {
        "layers": [
            {"config": {"name": "input_layer", "batch_shape": [None, 64, 64, 3]}},
            {"config": {"name": "rescaling", "scale": 1 / 255, "offset": 0.0}},
        ]
    }
}


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert torch.equal(actual[key], value) or key.endswith("num_batches_tracked")


def test_legacy_files(tmp_path, state):
    path = write_legacy(tmp_path / "b0.h5", keras_layers(state))
    assert_same(checkpoints.load(path), state)
    model = EfficientNet.from_checkpoint(path)
    variant = model.variant
    assert (variant.name, variant.padding, variant.padded_as) == ("b0", "same", 224)
    assert (variant.bn_eps, variant.bn_momentum) == (1e-3, 0.01)
    # As of the published weights, whose variances are deviations.
    assert variant.mean == pytest.approx(MEAN)
    assert variant.std == pytest.approx((0.229, 0.224, 0.225))


def test_the_package_efficientnet(tmp_path, state):
    layers = keras_layers(state)
    layers["probs"] = layers.pop("predictions")
    path = write_legacy(tmp_path / "a.h5", layers, normalised=False)
    checkpoint = checkpoints.open_checkpoint(path)
    assert checkpoint.family == "efficientnet"
    variant = EfficientNet.from_checkpoint(path).variant
    assert (variant.padding, variant.padded_as, variant.mean) == ("same", None, MEAN)


def test_whole_and_numbered_files(tmp_path, state):
    layers = keras_layers(state)
    whole = write_legacy(tmp_path / "whole.h5", layers, CONFIG)
    variant = EfficientNet.from_checkpoint(whole).variant
    assert (variant.padded_as, variant.crop, variant.squash) == (64, 64, True)
    assert variant.std == pytest.approx(np.sqrt(VARIANCE))
    write_numbered(tmp_path / "a.weights.h5", layers)
    assert_same(checkpoints.load(tmp_path / "a.weights.h5"), state)
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.write(tmp_path / "a.weights.h5", "model.weights.h5")
        archive.writestr("config.json", json.dumps(CONFIG))
    assert_same(checkpoints.load(tmp_path / "a.keras"), state)
    variant = EfficientNet.from_checkpoint(tmp_path / "a.keras").variant
    assert (variant.padded_as, variant.std) == (64, pytest.approx((0.2,) * 3))


def test_refusals(tmp_path, state, monkeypatch):
    path = tmp_path / "a.h5"
    layers = keras_layers(EfficientNet(TINY).state_dict())
    write_legacy(path, layers)
    size = path.stat().st_size
    with open(path, "rb+") as file:
        file.truncate(size // 2)
    with pytest.raises(ValueError, match=r"a\.h5: truncated or corrupt weights file"):
        checkpoints.load(path)
    with h5py.File(path, "w") as file:
        file["stem_conv/kernel"] = h5py.ExternalLink("other.h5", "/x")
    with pytest.raises(ValueError, match=r"a\.h5: 'kernel' is a link"):
        checkpoints.load(path)
    with h5py.File(path, "w") as file:
        file["dense/kernel"] = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"a\.h5: not an EfficientNet's state dict"):
        checkpoints.load(path)
    (tmp_path / "a.keras").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"a\.keras: truncated or corrupt"):
        checkpoints.load(tmp_path / "a.keras")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"a\.h5: .*pip install 'effnet-fast\[keras\]'"):
        checkpoints.load(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "side"),
    # Weights alone do not say for which side they are.
    [(".keras", 64), (".keras", 65), (".weights.h5", 64), (".h5", 64), (".h5", 65)],
)
def test_logits_are_keras(tmp_path, monkeypatch, side, suffix):
    monkeypatch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "torch"))
    keras = pytest.importorskip("keras", reason="Keras, the reference, is not installed")
    rng = np.random.default_rng(0)
    model = keras.applications.EfficientNetB0(
        weights=None, classes=4, input_shape=(side, side, 3), classifier_activation=None
    )
    for layer in model.layers:
        values = layer.get_weights()
        if type(layer).__name__ == "Normalization":
            layer.set_weights([np.float32(MEAN), np.float32(VARIANCE) ** 2, *values[2:]])
        elif type(layer).__name__ == "BatchNormalization":
            low, spread = (
                rng.uniform(0.5, 1.5, values[0].shape),
                rng.normal(0, 0.3, values[0].shape),
            )
            layer.set_weights([low, spread, spread / 3, low])
    path = tmp_path / f"a{suffix}"
    (model.save_weights if suffix == ".weights.h5" else model.save)(path)
    pixels = rng.integers(0, 256, (2, side, side, 3)).astype(np.float32)
    expected = keras.ops.convert_to_numpy(model(pixels, training=False))
    ours = EfficientNet.from_checkpoint(path).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (ours.variant.mean, ours.variant.std))
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        actual = ours(x).numpy()
    assert np.abs(expected[0] - expected[1]).max() > 100 * np.abs(actual - expected).max()
