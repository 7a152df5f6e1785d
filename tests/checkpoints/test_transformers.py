"""Folders of transformers: networks, class names and images, read and written."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_fast import EfficientNet, EfficientNetFeatures, checkpoints, cli
from effnet_fast.checkpoints import transformers_folder as reader
from effnet_fast.models import VARIANTS
from effnet_fast.pretrained import images
from foreign_folders import CONFIG, NAMES, PROCESSOR, small, transformers_folder
from foreign_logits import assert_same_logits, run
from networks import calibrated_state, random_images

SIDES = (64, 65, 67, 96)
WHY = "transformers is not installed: its folders are written by hand in the other tests"
# Blocks that begin at an odd side where images have one of 56: 28, 14, 7.
PADDINGS = {"even": [], "one": [2], "two": [1, 3], "all": [1, 2, 3, 7]}


@pytest.fixture(scope="module")
def state():
    return calibrated_state(small(), max(SIDES)) | {
        "classifier.1.weight": torch.randn(4, 640, generator=torch.Generator().manual_seed(1)) / 25,
        "classifier.1.bias": torch.zeros(4),
    }


def strided(depth=0.5):
    """The first block of each stage that strides, counted through."""
    variant = small(depth=depth)
    found, index = [], 0
    for stage in variant.stages:
        if stage.stride == 2:
            found.append(index)
        index += stage.repeats
    return found


def test_what_a_folder_brings(tmp_path, state):
    folder = transformers_folder(tmp_path, state, processor={})
    model = EfficientNet.from_checkpoint(folder)
    variant = model.variant
    assert (variant.stages, variant.head_channels) == (small().stages, 640)
    assert (variant.padding, variant.bn_eps, variant.bn_momentum) == ("same", 1e-3, 0.99)
    assert (variant.crop, variant.resize, variant.squash) == (64, 64, True)
    assert variant.interpolation == "nearest-exact"
    assert variant.mean == (0.485, 0.456, 0.406)
    assert variant.std == pytest.approx((0.229, 0.224, 0.225), rel=1e-6)
    assert model.class_names == NAMES
    block = model.features[2][0].block
    assert (block[0][1].momentum, block[1][1].momentum, block[3][1].momentum) == (0.1, 0.99, 0.99)
    assert model.features[1][0].block[0][1].momentum == 0.99  # without expansion
    assert model.classifier[0].p == 0.2


@pytest.mark.parametrize("bare", [False, True], ids=["whole", "model"])
def test_encoders(tmp_path, state, bare):
    folder = transformers_folder(tmp_path, state, bare=bare)
    encoder = EfficientNetFeatures.from_checkpoint(folder).eval()
    whole = EfficientNet.from_checkpoint(folder, num_classes=0).eval()
    x = random_images(1, 64)
    assert torch.equal(encoder(x)[-2], whole.forward_intermediates(x)[1][-2])
    with pytest.raises(ValueError, match="give num_classes=0") if bare else nullcontext():
        EfficientNet.from_checkpoint(folder)


@pytest.mark.parametrize("listed", PADDINGS.values(), ids=PADDINGS.keys())
def test_padding_is_the_folders_at_every_size(tmp_path, state, listed):
    folder = transformers_folder(tmp_path, state, {"depthwise_padding": listed})
    model = EfficientNet.from_checkpoint(folder).eval()
    found = {
        index: block.block[-3][0]
        for index, block in enumerate(b for stage in model.features[1:8] for b in stage)
        if block.block[-3][0].stride == (2, 2)
    }
    assert list(found) == strided()
    for index, conv in found.items():
        half = conv.kernel_size[0] // 2
        if index in listed:
            assert (type(conv), conv.padding) == (torch.nn.Conv2d, (half, half))
        else:
            assert conv.sides == (half - 1, half, half - 1, half)
    assert model.features[0][0].sides == (0, 1, 0, 1)
    table = reader.read({**CONFIG, "depthwise_padding": listed}, None).table
    assert reader.depthwise_padding(model.variant.padded_as, table) == listed
    stock = EfficientNet.from_checkpoint(folder, backend="reference").eval()
    assert_same_logits(model, stock, SIDES)


@pytest.mark.parametrize("listed", PADDINGS.values(), ids=PADDINGS.keys())
def test_logits_are_transformers(tmp_path, state, listed):
    transformers = pytest.importorskip("transformers", reason=WHY)
    folder = transformers_folder(tmp_path, state, {"depthwise_padding": listed})
    theirs = transformers.EfficientNetForImageClassification.from_pretrained(folder).eval()
    ours = EfficientNet.from_checkpoint(folder).eval()
    assert_same_logits(ours, theirs, SIDES)


def test_images_are_transformers(tmp_path, state):
    transformers = pytest.importorskip("transformers", reason=WHY)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8))
    for changes in (
        {},
        {"include_top": False, "resample": 3},
        {"rescale_offset": True, "rescale_factor": 1 / 127.5, "resample": 2},
        {"do_center_crop": True, "crop_size": {"height": 48, "width": 48}},
        {"do_normalize": False},
        {"do_center_crop": True, "crop_size": 48, "size": {"shortest_edge": 60}, "resample": 3},
    ):
        folder = transformers_folder(tmp_path, state, processor=changes)
        variant = EfficientNet.from_checkpoint(folder).variant
        kind = transformers.models.efficientnet.image_processing_pil_efficientnet
        processor = kind.EfficientNetImageProcessorPil(**{**PROCESSOR, **changes})
        expected = torch.as_tensor(np.array(processor(image)["pixel_values"][0]))
        actual = images.preset(variant)(image)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act must be one of swish, silu, got 'relu'"),
        ({"pooling_type": "max"}, "pooling_type must be one of mean, got 'max'"),
        ({"depth_divisor": 16}, "depth_divisor must be one of 8, got 16"),
        ({"squeeze_expansion_ratio": 0.5}, "squeeze_expansion_ratio must be one of 0.25"),
        ({"strides": [1, 2]}, "must be lists of one length"),
        ({"strides": [1, 2, 2, 3, 1, 2, 1]}, "stride must be 1 or 2, got 3"),
        ({"strides": [1, 2, 2, 2, 1, 2, "1"]}, "table cannot have 'baseline'"),
        ({"depth_coefficient": 1e300}, "table cannot have 'depth'"),
        ({"num_block_repeats": [1, 2, 2, 3, 3, 60000, 1]}, "more than 10000 blocks"),
        ({"depthwise_padding": "all"}, "depthwise_padding must be a list of blocks"),
        ({"image_size": [64, 65]}, "image_size must be the side of a square"),
        ({"batch_norm_eps": 0}, "network cannot have 'bn_eps' of 0"),
        ({"width_coefficient": 0.25}, "the first block of a stage must stride or change"),
        ({"width_coefficient": 1.0, "hidden_dim": 1280}, "weights do not fit the model"),
    ],
)
def test_refuses_what_no_network_here_has(tmp_path, state, config, message):
    folder = transformers_folder(tmp_path, state, config)
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*: .*{message}"):
        EfficientNet.from_checkpoint(folder)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"resample": 1}, "resample must be one of 0, 2, 3, got 1"),
        ({"size": {"height": 64, "width": 32}}, "size must be the side of a square"),
        ({"image_std": [1, 1, 0]}, "images cannot have 'std'"),
        ({"image_mean": "none"}, "must be numbers"),
        ({"size": {"shortest_edge": 64}}, "size must name height and width"),
    ],
)
def test_refuses_what_no_preset_does(tmp_path, state, processor, message):
    folder = transformers_folder(tmp_path, state, processor=processor)
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*: .*{message}"):
        EfficientNet.from_checkpoint(folder)


def test_names_alone_are_of_the_published_size(tmp_path):
    with torch.device("meta"):
        b0 = EfficientNet("b0", num_classes=2)
    b0 = b0.to_empty(device="cpu").state_dict()
    path = tmp_path / "a.safetensors"
    checkpoints.save(checkpoints.convert(b0, "transformers"), path)
    variant = EfficientNet.from_checkpoint(path).variant
    assert (variant.name, variant.padded_as, variant.bn_momentum) == ("b0", 224, 0.99)
    assert variant.expand_bn_momentum == 0.1


@pytest.mark.parametrize("source", ["transformers", "torchvision"])
def test_writes_a_folder(tmp_path, state, capsys, source):
    before, there = tmp_path / "before", tmp_path / "there"
    transformers_folder(before, state, {"depthwise_padding": [2]}, processor={})
    first = EfficientNet.from_checkpoint(before).eval()
    given = before
    if source == "torchvision":  # a file of ours remembers what the folder says
        given = tmp_path / "a.safetensors"
        checkpoints.save(first.state_dict(), given)
    assert cli.main(["convert", str(given), str(there), "--to", "transformers"]) == 0
    assert {file.name for file in there.iterdir()} == {
        *("model.safetensors", "config.json", "preprocessor_config.json")
    }
    config = json.loads((there / "config.json").read_text())
    assert config["depthwise_padding"] == [2]
    assert tuple(config["id2label"].values()) == NAMES
    second = EfficientNet.from_checkpoint(there).eval()
    assert replace(second.variant, std=()) == replace(first.variant, std=())
    assert second.variant.std == pytest.approx(first.variant.std)
    assert second.class_names == NAMES
    x = random_images(2, 65)
    assert torch.equal(run(first, x), run(second, x))
    assert cli.main(["convert", str(given), str(there), "--to", "transformers", "--force"]) != 0
    assert "exists; no folder is replaced" in capsys.readouterr().err
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_transformers_reads_what_is_written(tmp_path, state):
    transformers = pytest.importorskip("transformers", reason=WHY)
    source, there = tmp_path / "a.safetensors", tmp_path / "there"
    variant = small(padded_as=56)
    model = EfficientNet(variant, num_classes=4).eval()
    model.load_state_dict(state)
    folder = transformers_folder(tmp_path / "f", state, {"depthwise_padding": [2]})
    assert cli.main(["convert", str(folder), str(there), "--to", "transformers"]) == 0
    theirs = transformers.EfficientNetForImageClassification.from_pretrained(there).eval()
    ours = EfficientNet.from_checkpoint(there).eval()
    x = random_images(2, 65)
    torch.testing.assert_close(run(ours, x), run(theirs, x), rtol=1e-4, atol=1e-5)
    assert theirs.config.id2label == dict(enumerate(NAMES))
    del source


def test_no_folder_of_other_networks(tmp_path):
    with pytest.raises(ValueError, match="SiLU and squeeze-and-excitation alone"):
        reader.config_of(VARIANTS["lite0"], 3, 10, ())
    assert reader.config_of(VARIANTS["b7"], 3, 10, ())["depthwise_padding"] == [18]


def test_classify_gives_a_64_pixel_model_64(tmp_path, state, capsys, monkeypatch):
    folder = transformers_folder(tmp_path / "net", state, processor={"resample": 3})
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)).save(path)
    assert cli.main(["classify", str(path), "--weights", str(folder), "--json"]) == 0
    top = json.loads(capsys.readouterr().out)["images"][0]["top"]
    assert {entry["label"] for entry in top} == set(NAMES)
    model = EfficientNet.from_checkpoint(folder).eval()
    x = images.preset(model.variant)(images.load(path))[None]
    assert x.shape == (1, 3, 64, 64)
    expected = run(model, x)[0].softmax(0)
    assert top[0]["probability"] == pytest.approx(expected.max().item(), rel=1e-5)
