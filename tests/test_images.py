"""Image files: what is refused, and the same tensor as torchvision's evaluation preset."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from effnet_fast import images
from effnet_fast.models.variants import VARIANTS

# Both resize with Pillow to the same bytes; what is left is the order of fp32 operations.
PREPROCESS_ATOL = 1e-6

SIZES = {  # width, height
    "landscape": (451, 300),
    "portrait": (300, 451),
    "square": (320, 320),
    "odd": (333, 257),
    "smaller_than_crop": (97, 61),
    "shorter_side_fits": (256, 511),
}


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
    )
    expected = preset(image).unsqueeze(0)
    actual = images.preprocess(image, variant)
    assert actual.dtype == torch.float32
    assert actual.shape == (1, 3, variant.crop, variant.crop)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, expected, rtol=0, atol=PREPROCESS_ATOL)


def test_preprocess_would_notice_another_interpolation():
    image, variant = photo(451, 300), VARIANTS["b0"]
    preset = ImageClassification(
        crop_size=variant.crop,
        resize_size=variant.resize,
        interpolation=InterpolationMode.BILINEAR,
    )
    difference = (images.preprocess(image, variant) - preset(image)).abs().max()
    assert difference > 100 * PREPROCESS_ATOL


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


def test_preprocess_refuses_extreme_aspect():
    with pytest.raises(ValueError, match="too narrow"):
        images.preprocess(Image.new("RGB", (1_000_000, 1)), VARIANTS["b0"])
