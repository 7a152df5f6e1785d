"""EfficientNet.from_checkpoint: what is read from a file, and what is refused."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from effnet_fast import EfficientNet, EfficientNetFeatures, checkpoints
from effnet_fast.checkpoints import FAMILIES, FAMILY_ENTRY, NAMINGS, Checkpoint
from effnet_fast.models import VARIANTS
from effnet_fast.models.input_channels import adapt_input_channels
from effnet_fast.models.loading import family_variant, published_variant
from host import serve
from networks import TINY

CLASSES = 5
STEM = "features.0.0.weight"
NAMES_OF_ANOTHER = ("smp", "efficientnet")  # lukemelas's and keras's, which a file is taken for
EXPAND_MOMENTA = {"transformers": (0.1,)}  # whose expansions have a momentum of their own


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return EfficientNet(TINY, num_classes=CLASSES).state_dict()


@pytest.fixture(scope="module")
def b0():
    torch.manual_seed(0)
    return EfficientNet("b0", num_classes=CLASSES).state_dict()


def write(state, path, **metadata):
    checkpoints.save(state, path, metadata)
    return path


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def norms(model):
    return {(m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "size"),
    [
        (family, size)
        for family in FAMILIES
        for size in VARIANTS
        if "fused" in NAMINGS[FAMILIES[family].naming].blocks or not VARIANTS[size].has_fused
    ],
)
def test_size_is_read_from_the_shapes(family, size):
    with torch.device("meta"):
        state = EfficientNet(size, num_classes=7, in_chans=2).state_dict()
    named = checkpoints.convert(state, family)
    assert published_variant(checkpoints.convert(named)) == VARIANTS[size]


@pytest.mark.parametrize(
    ("family", "size", "padding", "eps", "momentum", "resize"),
    [
        ("torchvision", "b0", "symmetric", 1e-5, 0.1, 256),
        ("torchvision", "b7", "symmetric", 1e-3, 0.01, 600),
        ("timm", "b4", "symmetric", 1e-5, 0.1, 384),
        ("timm", "b7", "symmetric", 1e-5, 0.1, 600),
        ("timm_tf", "b0", "same", 1e-3, 0.1, 256),
        ("timm_tf", "b7", "same", 1e-3, 0.1, 632),
        ("lukemelas", "b4", "same", 1e-3, 0.01, 412),
        ("nvidia", "b4", "symmetric", 1e-3, 0.01, 412),
    ],
)
def test_what_a_family_brings(family, size, padding, eps, momentum, resize):
    variant = family_variant(VARIANTS[size], Checkpoint({}, family, family))
    found = (variant.padding, variant.bn_eps, variant.bn_momentum, variant.resize)
    assert found == (padding, eps, momentum, resize)
    assert variant.mean == (0.485, 0.456, 0.406)
    other = family_variant(VARIANTS[size], Checkpoint({}, family, family, inception=True))
    assert other.mean == other.std == (0.5, 0.5, 0.5)


def test_smp_brings_what_lukemelas_does():
    found = [
        (variant.padding, variant.bn_eps, variant.bn_momentum, variant.resize)
        for variant in (
            family_variant(VARIANTS["b4"], Checkpoint({}, family, family))
            for family in ("smp", "lukemelas")
        )
    ]
    assert found == [("same", 1e-3, 0.01, 412)] * 2


@pytest.mark.parametrize(
    ("family", "size", "padding", "eps", "images"),
    [
        ("torchvision", "v2_s", "symmetric", 1e-3, (384, "bilinear", 0.485)),
        ("torchvision", "v2_l", "symmetric", 1e-3, (480, "bicubic", 0.5)),
        ("timm", "v2_l", "symmetric", 1e-5, (480, "bicubic", 0.485)),
        ("timm_tf", "v2_s", "same", 1e-3, (384, "bicubic", 0.5)),
    ],
)
def test_what_a_family_brings_to_v2(family, size, padding, eps, images):
    variant = family_variant(VARIANTS[size], Checkpoint({}, family, family))
    assert (variant.padding, variant.bn_eps, variant.bn_momentum) == (padding, eps, 0.1)
    assert (variant.crop, variant.interpolation, variant.mean[0]) == images
    assert variant.resize == variant.crop


@pytest.mark.parametrize("family", ["lukemelas", "nvidia"])
def test_families_without_v2(family):
    with pytest.raises(ValueError, match=f"{family} has no FusedMBConv, and so no EfficientNetV2"):
        family_variant(VARIANTS["v2_s"], Checkpoint({}, family, family))


@pytest.mark.parametrize(
    ("family", "padding", "eps", "momentum", "resize", "mean", "std"),
    [
        ("torchvision", "same", 1e-3, 0.01, 272, 127 / 255, 128 / 255),
        ("timm", "symmetric", 1e-5, 0.1, 272, 0.485, 0.229),
        ("timm_tf", "same", 1e-3, 0.1, 272, 0.5, 0.5),
        ("lukemelas", "same", 1e-3, 0.01, 272, 127 / 255, 128 / 255),
    ],
)
def test_what_a_family_brings_to_lite(family, padding, eps, momentum, resize, mean, std):
    variant = family_variant(VARIANTS["lite1"], Checkpoint({}, family, family))
    found = (variant.padding, variant.bn_eps, variant.bn_momentum, variant.resize)
    assert found == (padding, eps, momentum, resize)
    assert (variant.mean[0], variant.std[0]) == (mean, std)
    assert (variant.activation, variant.squeeze, variant.head) == ("relu6", False, 1280)


def test_lite_and_b0_are_told_apart(tmp_path):
    """Their channels and repeats are the same."""
    torch.manual_seed(0)
    for size in ("b0", "lite0"):
        state = EfficientNet(size, num_classes=CLASSES).state_dict()
        for family in ("torchvision", "lukemelas"):
            path = write(checkpoints.convert(state, family), tmp_path / f"{size}_{family}.pth")
            model = EfficientNet.from_checkpoint(path)
            assert model.variant.name == size
            assert_same(model.state_dict(), state)
            is_symmetric = (size, family) == ("b0", "torchvision")
            assert model.variant.padding == ("symmetric" if is_symmetric else "same")


def test_lite_saved_from_here_stays_lite(tmp_path):
    """Its names are torchvision's, its padding and eps TensorFlow's; nothing warns."""
    model = EfficientNet("lite0", num_classes=CLASSES)
    path = write(model.state_dict(), tmp_path / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = EfficientNet.from_checkpoint(path)
        checkpoints.load_into(model, path)
    assert again.variant == model.variant
    timm = write(checkpoints.convert(model.state_dict(), "timm"), tmp_path / "lite.pth")
    with pytest.warns(UserWarning, match="networks of timm have padding='symmetric' and this"):
        checkpoints.load_into(model, timm, "timm")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("family", FAMILIES)
def test_builds_the_familys_network(tmp_path, b0, family, suffix):
    path = tmp_path / f"{'tf_' if family == 'timm_tf' else ''}efficientnet_b0{suffix}"
    write(checkpoints.convert(b0, family), path)
    told = family if family in NAMES_OF_ANOTHER else "auto"
    model = EfficientNet.from_checkpoint(path, family=told)
    assert_same(model.state_dict(), b0)
    variant = family_variant(VARIANTS["b0"], Checkpoint({}, family, family))
    assert model.variant == variant
    momenta = {variant.bn_momentum, *EXPAND_MOMENTA.get(family, ())}
    assert norms(model) == {(variant.bn_eps, momentum) for momentum in momenta}
    assert (type(model.features[0][0]) is nn.Conv2d) == (variant.padding == "symmetric")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.untyped_storage().resizable() for parameter in model.parameters())


def test_metadata_bring_the_family_back(tmp_path, b0):
    path = write(b0, tmp_path / "a.safetensors", **{FAMILY_ENTRY: "timm_tf"})
    assert EfficientNet.from_checkpoint(path).variant.padding == "same"
    assert EfficientNet.from_checkpoint(path, family="nvidia").variant.padding == "symmetric"


def test_warns_of_what_is_assumed(tmp_path, tiny):
    path = write(checkpoints.convert(tiny, "timm"), tmp_path / "last.pth")
    with pytest.warns(UserWarning, match=r"last\.pth: timm's plain network is assumed") as caught:
        EfficientNet.from_checkpoint(path, variant=TINY)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EfficientNet.from_checkpoint(path, variant=TINY, family="timm")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_cast(tmp_path, tiny, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.items()}
    model = EfficientNet.from_checkpoint(write(state, tmp_path / "a.pth"), variant=TINY)
    expected = {k: v.to(tiny[k].dtype) for k, v in state.items()}
    assert_same(model.state_dict(), expected)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_model_lets_go_of_the_file(tmp_path, tiny, suffix):
    path = write(tiny, tmp_path / f"a{suffix}")
    model = EfficientNet.from_checkpoint(path, variant=TINY)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert_same(model.state_dict(), tiny)
    assert_same(copy.deepcopy(model).state_dict(), tiny)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_in_chans(tmp_path, tiny, in_chans):
    path = write(tiny, tmp_path / "a.safetensors")
    model = EfficientNet.from_checkpoint(path, variant=TINY, in_chans=in_chans)
    stem = adapt_input_channels(tiny[STEM], in_chans)
    assert_same(model.state_dict(), {**tiny, STEM: stem})
    assert model.eval()(torch.randn(1, in_chans, 32, 32)).shape == (1, CLASSES)
    again = write(model.state_dict(), tmp_path / "b.safetensors")
    assert EfficientNet.from_checkpoint(again, variant=TINY).features[0][0].in_channels == in_chans


def test_options_are_passed_on(tmp_path, tiny):
    path = write(tiny, tmp_path / "a.pth")
    model = EfficientNet.from_checkpoint(path, variant=TINY, dropout=0.7, backend="reference")
    assert (model.classifier[0].p, model.backend) == (0.7, "reference")
    with pytest.raises(ValueError, match=r"^dropout must be between 0 and 1"):
        EfficientNet.from_checkpoint(path, variant=TINY, dropout=7)


def test_norm_layer(tmp_path, tiny):
    class Counting(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.register_buffer("ones", torch.ones(channels), persistent=False)

    path = write(tiny, tmp_path / "a.pth")
    for norm_layer in (partial(nn.BatchNorm2d, eps=0.5), Counting):
        model = EfficientNet.from_checkpoint(path, variant=TINY, norm_layer=norm_layer)
        assert_same(model.state_dict(), tiny)
        assert not any(tensor.is_meta for tensor in model.buffers())
    assert all(m.ones.eq(1).all() for m in model.modules() if isinstance(m, Counting))


def test_num_classes(tmp_path, tiny):
    path = write(tiny, tmp_path / "a.pth")
    assert EfficientNet.from_checkpoint(path, variant=TINY, num_classes=CLASSES)
    with pytest.raises(ValueError, match=r"a\.pth: num_classes is 9, but .* has 5 classes: leave"):
        EfficientNet.from_checkpoint(path, variant=TINY, num_classes=9)
    encoder = {key: value for key, value in tiny.items() if not key.startswith("classifier.")}
    path = write(encoder, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b\.pth: no classifier\.1\.weight: give num_classes=0"):
        EfficientNet.from_checkpoint(path, variant=TINY)
    for name in ("a.pth", "b.pth"):
        model = EfficientNet.from_checkpoint(tmp_path / name, variant=TINY, num_classes=0)
        assert_same(model.state_dict(), encoder)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, torch.compile], ids=["", "dp", "c"])
def test_what_is_trained_on_stays_of_its_family(tmp_path, tiny, family, wrap):
    path = write(checkpoints.convert(tiny, family), tmp_path / "efficientnet_b0_ap.pth")
    model = EfficientNet.from_checkpoint(path, variant=TINY, family=family)
    copied = copy.deepcopy(model)
    again = tmp_path / "best.pth"
    torch.save({"epoch": 1, "state_dict": wrap(copied).state_dict()}, again)
    for suffix in (".safetensors", ".pt"):
        checkpoints.save(wrap(copied).state_dict(), again.with_suffix(suffix))
    for suffix in (".pth", ".safetensors", ".pt"):
        loaded = EfficientNet.from_checkpoint(again.with_suffix(suffix), variant=TINY)
        assert loaded.variant == model.variant
        assert_same(loaded.state_dict(), tiny)


@pytest.mark.slow
def test_encoder(tmp_path, b0):
    path = write(checkpoints.convert(b0, "timm"), tmp_path / "tf_efficientnet_b0.pth")
    whole = EfficientNet.from_checkpoint(path).eval()
    x = torch.randn(1, 3, 64, 96)
    for out_indices in ((0, 1, 2, 3, 4), (1, 3)):
        encoder = EfficientNetFeatures.from_checkpoint(path, out_indices=out_indices).eval()
        assert encoder.variant == whole.variant
        maps = whole.forward_intermediates(x, list(out_indices), intermediates_only=True)
        assert all(map(torch.equal, encoder(x), maps))
        again = write(encoder.state_dict(), tmp_path / "encoder.safetensors")
        loaded = EfficientNetFeatures.from_checkpoint(again, out_indices=out_indices)
        assert_same(loaded.state_dict(), encoder.state_dict())
    with pytest.raises(ValueError, match=r"encoder\.safetensors: .* missing \(features\.6\."):
        EfficientNetFeatures.from_checkpoint(again)
    grey = EfficientNetFeatures.from_checkpoint(path, in_chans=1)
    assert grey.features[0][0].in_channels == 1


@pytest.mark.slow
def test_encoder_of_no_published_size(tmp_path, tiny):
    path = write(tiny, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: no published size .*Give variant=") as caught:
        EfficientNetFeatures.from_checkpoint(path)
    assert "classifier" not in str(caught.value)
    encoder = EfficientNetFeatures.from_checkpoint(path, variant=TINY)
    assert_same(encoder.state_dict(), {k: v for k, v in tiny.items() if k in encoder.state_dict()})


@pytest.mark.slow
def test_names_what_differs_from_the_variant(tmp_path, tiny, b0):
    path = write(b0, tmp_path / "a.pth")
    message = (
        r"a\.pth: weights do not fit the model: 148 missing \(features\.1\.1\.block\.0\.0\.wei"
    )
    with pytest.raises(ValueError, match=message):
        EfficientNet.from_checkpoint(path, variant="b1")
    with pytest.raises(ValueError, match=r"a\.pth: variant must be one of b0, .*, got 'b9'"):
        EfficientNet.from_checkpoint(path, variant="b9")
    path = write(tiny, tmp_path / "b.pth")
    message = r"b\.pth: no published size has these layers; the nearest is b\d: weights do not fit"
    with pytest.raises(ValueError, match=message + r".* instead of .*Give variant="):
        EfficientNet.from_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "features.3.1.block.0.0.weight",
            None,
            r"1 missing \(features\.3\.1\.block\.0\.0\.weight\)",
        ),
        ("features.9.0.weight", torch.ones(1), r"1 unexpected \(features\.9\.0\.weight\)"),
        ("features.8.0.weight", torch.ones(2, 3), r"8\.0\.weight \(2, 3\) instead of \(1280, 320"),
        ("classifier.1.weight", torch.ones(()), r"classifier\.1\.weight \(\) instead of"),
        (STEM, torch.ones(3), rf"{STEM} \(3,\) instead of \(32, 3, 3, 3\)"),
        (STEM, torch.ones(32), rf"{STEM} has shape \(32,\), not four dimensions"),
    ],
)
def test_names_the_one_tensor_that_differs(tmp_path, b0, key, value, message):
    state = {**b0, key: value}
    if value is None:
        del state[key]
    with pytest.raises(ValueError, match=rf"a\.pth: .*{message}"):
        EfficientNet.from_checkpoint(write(state, tmp_path / "a.pth"))


def test_an_encoder_refuses_what_no_network_of_its_size_has(tmp_path, b0):
    path = write({**b0, "features.9.0.weight": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"1 unexpected \(features\.9\.0\.weight\)"):
        EfficientNetFeatures.from_checkpoint(path, variant="b0")


def test_variants_of_ones_own(tmp_path, tiny):
    path = write(checkpoints.convert(tiny, "lukemelas"), tmp_path / "a.safetensors")
    model = EfficientNet.from_checkpoint(path, variant=replace(TINY, bn_eps=1.0))
    assert model.variant == replace(
        TINY, padding="same", bn_eps=1e-3, bn_momentum=0.01, resize=80, crop=48
    )


def test_addresses(tmp_path, tiny, quick_retries, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path = write(checkpoints.convert(tiny, "timm"), tmp_path / "a.pth")
    with serve(path.read_bytes()) as host:
        url = host.url("tf_efficientnet_b0")
        model = EfficientNet.from_checkpoint(url, variant=TINY, progress=False)
        assert_same(checkpoints.load(url, progress=False), tiny)
    assert_same(model.state_dict(), tiny)
    assert model.variant.padding == "same"
