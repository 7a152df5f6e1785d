"""Image files: what is refused, and the same tensor as torchvision's evaluation preset."""

import functools
import itertools
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from effnet_fast.models.variants import VARIANTS
from effnet_fast.pretrained import images

SIZES = {  # width, height
    "landscape": (451, 300),
    "portrait": (300, 451),
    "square": (320, 320),
    "odd": (333, 257),
    "smaller_than_crop": (97, 61),
    "shorter_side_fits": (256, 511),
}


@functools.cache
def photo(width, height, mode="RGB"):
    """Smooth shapes with noise, so that resampling matters."""
    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(xx / 17 + k) * np.cos(yy / 23 - k) for k in range(3)]
    pixels = np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def save(image, path, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda v: v.name)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_preprocess_matches_torchvision(variant, size):
    image = photo(*size)
    preset = ImageClassification(
        crop_size=variant.crop,
        resize_size=variant.resize,
        interpolation=InterpolationMode(variant.interpolation),
        mean=variant.mean,
        std=variant.std,
    )
    expected = preset(image)[None]
    actual = images.preset(variant)(image)[None]
    assert actual.dtype == torch.float32
    assert actual.shape == (1, 3, variant.crop, variant.crop)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_load_reads_format(tmp_path, suffix):
    image = images.load(save(photo(40, 30), tmp_path / f"a.{suffix}"))
    assert (image.mode, image.size) == ("RGB", (40, 30))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_load_converts_mode(tmp_path, mode):
    source = photo(40, 30).convert("L") if mode == "LA" else photo(40, 30)
    image = images.load(save(source.convert(mode), tmp_path / "a.png"))
    assert image.mode == "RGB"


def test_load_converts_cmyk(tmp_path):
    assert images.load(save(photo(40, 30, "CMYK"), tmp_path / "a.jpg")).mode == "RGB"


def test_load_scales_16_bit_grey(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16)
    image = images.load(save(Image.fromarray(ramp), tmp_path / "a.png"))
    assert np.array_equal(np.asarray(image)[..., 0], (ramp >> 8).astype(np.uint8))


def test_load_applies_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    path = save(photo(40, 30), tmp_path / "a.png", exif=exif)
    assert images.load(path).size == (30, 40)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_load_refuses_truncated(tmp_path, suffix):
    path = save(photo(200, 150), tmp_path / f"a.{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"a\.{suffix}: truncated or corrupt"):
        images.load(path)


def test_load_refuses_corrupt_chunk(tmp_path):
    path = save(photo(200, 150), tmp_path / "a.png")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png: truncated or corrupt"):
        images.load(path)


@pytest.mark.parametrize("content", [b"", b"not an image at all"], ids=["empty", "text"])
def test_load_refuses_what_is_no_image(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png: not an image of type JPEG, PNG, WEBP"):
        images.load(path)


def test_load_refuses_other_formats(tmp_path):
    path = save(photo(40, 30), tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif: not an image of type"):
        images.load(path)


@pytest.mark.parametrize("factor", [0.9, 0.1], ids=["warned", "refused_by_pillow"])
def test_load_refuses_bombs(tmp_path, monkeypatch, factor):
    path = save(photo(100, 100), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(100 * 100 * factor))
    with pytest.raises(ValueError, match=r"a\.png: refused as a decompression bomb"):
        images.load(path)


def test_load_passes_on_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        images.load(tmp_path / "absent.png")
    with pytest.raises(IsADirectoryError):
        images.load(tmp_path)


PRESETS = {  # crop, resize, interpolation; zeros fill what a larger crop lacks
    "b0": (224, 256, "bicubic"),
    "b1_v2": (240, 255, "bilinear"),
    "crop_is_resize": (288, 288, "bicubic"),
    "crop_larger": (301, 256, "bilinear"),
    "crop_larger_than_both": (260, 97, "bicubic"),
    "odd": (97, 131, "bicubic"),
}
TENSORS = {
    "uint8": lambda x: x,
    "float32": lambda x: x / 255,
    "float64": lambda x: x.double() / 255,
    "bfloat16": lambda x: (x / 255).bfloat16(),
    "float16": lambda x: (x / 255).half(),
    "int16": lambda x: x.short() * 128,
    "int64": lambda x: x.long() << 55,
}


def presets(crop, resize, interpolation="bicubic", **options):
    """Ours and torchvision's."""
    ours = images.ImageClassification(
        crop_size=crop, resize_size=resize, interpolation=interpolation, **options
    )
    theirs = ImageClassification(
        crop_size=crop,
        resize_size=resize,
        interpolation=InterpolationMode(interpolation),
        **options,
    )
    return ours, theirs


def tensor(width, height):
    """uint8 [3,H,W]."""
    return torch.from_numpy(np.array(photo(width, height))).permute(2, 0, 1).contiguous()


class TestPreset:
    @pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
    @pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
    def test_images_equal_torchvision(self, preset, size):
        ours, theirs = presets(*preset)
        image = photo(*size)
        actual, expected = ours(image), theirs(image)
        assert actual.shape == (3, preset[0], preset[0])
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)

    @pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
    @pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
    def test_tensors_equal_torchvision(self, preset, size):
        ours, theirs = presets(*preset)
        x = tensor(*size)
        before = x.clone()
        assert torch.equal(ours(x), theirs(x))
        assert torch.equal(x, before)

    @pytest.mark.parametrize("interpolation", images.INTERPOLATIONS)
    def test_antialias_equals_torchvision(self, interpolation):
        x = tensor(211, 157)
        results = []
        for antialias in (True, False, None):
            ours, theirs = presets(97, 101, interpolation, antialias=antialias)
            results.append(ours(x))
            assert torch.equal(results[-1], theirs(x))
        assert torch.equal(results[1], results[2])
        if interpolation != "nearest-exact":  # which filters nothing
            assert (results[0] - results[1]).abs().max() > 0.1

    def test_interpolations_differ(self):
        for image in (photo(211, 157), tensor(211, 157)):
            results = [presets(97, 131, how)[0](image) for how in images.INTERPOLATIONS]
            for a, b in itertools.combinations(results, 2):
                assert (a - b).abs().max() > 0.1

    @pytest.mark.parametrize("interpolation", images.INTERPOLATIONS)
    def test_two_sides_equal_torchvision(self, interpolation):
        theirs = presets(61, 64, interpolation)[1]
        ours = images.ImageClassification(
            crop_size=61, resize_size=[64, 72], interpolation=interpolation
        )
        theirs.resize_size = [64, 72]  # its constructor takes one side
        for image in (photo(211, 157), tensor(211, 157), tensor(20, 300)):
            assert torch.equal(ours(image), theirs(image))

    @pytest.mark.parametrize("convert", TENSORS.values(), ids=TENSORS.keys())
    @pytest.mark.parametrize("interpolation", images.INTERPOLATIONS)
    def test_dtypes_equal_torchvision(self, interpolation, convert):
        ours, theirs = presets(97, 131, interpolation)
        x = convert(tensor(211, 157))
        actual = ours(x)
        assert actual.dtype == torch.float32
        assert torch.equal(actual, theirs(x))

    def test_bicubic_overshoot_is_clipped_as_in_torchvision(self):
        ours, theirs = presets(97, 131)
        x = (torch.rand(3, 50, 60) > 0.5).to(torch.uint8) * 255
        assert torch.equal(ours(x), theirs(x))

    @pytest.mark.parametrize("leading", [(1,), (4,), (2, 3), (2, 1, 2)], ids=str)
    def test_batches_are_their_images(self, leading):
        ours, theirs = presets(97, 131)
        singles = [tensor(211, 157).roll(i, dims=-1) for i in range(torch.Size(leading).numel())]
        x = torch.stack(singles).reshape(*leading, 3, 157, 211)
        expected = torch.stack([theirs(single) for single in singles])
        assert torch.equal(ours(x), expected.reshape(*leading, 3, 97, 97))

    @pytest.mark.parametrize("side", [50, 131])
    def test_empty_batches(self, side):
        ours, _ = presets(97, 131)
        assert ours(torch.ones(0, 3, side, side)).shape == (0, 3, 97, 97)

    @pytest.mark.parametrize("layout", ["channels_last", "sliced", "flipped"])
    def test_layouts(self, layout):
        ours, theirs = presets(97, 131)
        x = torch.stack([tensor(211, 157), tensor(211, 157).flip(1)])
        x = {
            "channels_last": x.contiguous(memory_format=torch.channels_last),
            "sliced": x[:, :, 3:100, 5::2],
            "flipped": x.transpose(2, 3),
        }[layout]
        assert torch.equal(ours(x), theirs(x))

    @pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "YCbCr"])
    def test_images_of_other_modes_are_converted(self, mode):
        ours, theirs = presets(97, 131)
        if mode == "I;16":
            grey = np.asarray(photo(211, 157).convert("L")).astype(np.uint16) * 256
            image, rgb = Image.fromarray(grey), photo(211, 157).convert("L").convert("RGB")
        else:
            base = photo(211, 157, "L") if mode == "LA" else photo(211, 157)
            image = base.convert(mode)
            rgb = image.convert("RGB")
        assert image.mode == mode
        assert torch.equal(ours(image), theirs(rgb))

    def test_the_default_dtype_changes_nothing(self):
        preset, x = presets(97, 131)[0], tensor(211, 157)
        expected = preset(x)
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.equal(preset(x), expected)
        finally:
            torch.set_default_dtype(torch.float32)

    def test_large_images_that_shrink_are_fine(self, monkeypatch):
        ours, theirs = presets(97, 131)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
        assert torch.equal(ours(photo(333, 257)), theirs(photo(333, 257)))

    def test_other_constants(self):
        constants = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)}
        ours, theirs = presets(97, 131, **constants)
        for image in (photo(211, 157), tensor(211, 157)):
            assert torch.equal(ours(image), theirs(image))

    def test_takes_torchvisions_interpolation(self):
        preset = images.ImageClassification(
            crop_size=97, resize_size=131, interpolation=InterpolationMode.BICUBIC
        )
        assert torch.equal(preset(tensor(211, 157)), presets(97, 131)[0](tensor(211, 157)))

    def test_is_a_module_without_state(self):
        preset = images.preset(VARIANTS["b0"])
        assert list(preset.state_dict()) == []
        x = tensor(211, 157)
        assert torch.equal(torch.nn.Sequential(preset)(x), preset(x))
        assert "crop_size=[224], resize_size=[256]" in repr(preset)
        assert torch.equal(pickle.loads(pickle.dumps(preset))(x), preset(x))

    def test_passes_gradients(self):
        x = torch.rand(3, 40, 50, requires_grad=True)
        presets(33, 35)[0](x).sum().backward()
        assert x.grad.abs().sum() > 0

    def test_says_that_pillow_always_filters(self):
        ours, theirs = presets(97, 131, antialias=False)
        with pytest.warns(UserWarning, match="Pillow always filters"):
            actual = ours(photo(211, 157))
        with pytest.warns(UserWarning, match="Anti-alias option is always applied"):
            assert torch.equal(actual, theirs(photo(211, 157)))

    @pytest.mark.parametrize(
        ("image", "error", "message"),
        [
            (torch.ones(1, 9, 9), ValueError, r"\[\.\.\.,3,H,W\], got \(1, 9, 9\)"),
            (torch.ones(2, 4, 9, 9), ValueError, r"got \(2, 4, 9, 9\)"),
            (torch.ones(9, 9), ValueError, r"got \(9, 9\)"),
            (torch.ones(3, 0, 9), ValueError, "9x0 pixels"),
            (torch.ones(3, 9, 9, dtype=torch.bool), TypeError, "got torch.bool"),
            (torch.ones(3, 9, 9, dtype=torch.complex64), TypeError, "got torch.complex64"),
            (np.ones((9, 9, 3), np.uint8), TypeError, "Pillow image or a tensor, got ndarray"),
            ("a.png", TypeError, "got str"),
        ],
    )
    def test_refuses_other_inputs(self, image, error, message):
        with pytest.raises(error, match=message):
            presets(97, 131)[0](image)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"crop_size": 0}, "crop_size must be an int of at least 1, got 0"),
            ({"crop_size": 9, "resize_size": 9.0}, "resize_size must be an int"),
            ({"crop_size": 9, "interpolation": "nearest"}, "bicubic, nearest-exact, got 'near"),
            ({"crop_size": 9, "resize_size": (9, 9, 9)}, "resize_size must be one or two ints"),
            ({"crop_size": 9, "resize_size": (9, 0)}, "resize_size must be an int of at least 1"),
            ({"crop_size": 9, "std": (1, 1, 0)}, "std without 0"),
            ({"crop_size": 9, "mean": (1,)}, "three numbers"),
        ],
    )
    def test_refuses_other_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            images.ImageClassification(**options)


def test_preset_refuses_extreme_aspect():
    with pytest.raises(ValueError, match="too narrow"):
        images.preset(VARIANTS["b0"])(Image.new("RGB", (1_000_000, 1)))
