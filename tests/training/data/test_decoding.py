"""Crops: the preset's pixels in evaluation, torchvision's random part in training."""

import math
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as torchvision_functional

from effnet_fast.models.variants import VARIANTS
from effnet_fast.pretrained import images
from effnet_fast.training.data import decoding
from effnet_fast.training.data.decoding import Draw, EvaluationCrop, TrainingCrop, decode
from image_folders import encoded, photo

PRESETS = ("b0", "b1", "lite0", "v2_s")  # interpolations and sizes; Lite squashes none


@pytest.fixture
def jpeg(tmp_path):
    path = tmp_path / "a.jpg"
    photo(500, 375).save(path, quality=95)
    return path


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_evaluation_crop_normalised_is_the_preset(tmp_path, name, suffix):
    path = tmp_path / f"a.{suffix}"
    photo(301, 260).save(path)
    preset = images.preset(VARIANTS[name])
    pixels = EvaluationCrop(preset)(path)
    assert pixels.dtype == torch.uint8
    assert torch.equal(preset.normalise(pixels), preset(images.load(path)))
    assert torch.equal(pixels, EvaluationCrop(preset)(path.read_bytes()))
    assert torch.equal(pixels, EvaluationCrop(preset)(images.load(path)))


def test_evaluation_crop_with_draft_keeps_the_picture(tmp_path):
    path = tmp_path / "a.jpg"
    photo(1200, 900).save(path, quality=95)
    preset = images.ImageClassification(crop_size=64, resize_size=80)
    whole, drafted = (EvaluationCrop(preset, draft=draft)(path).int() for draft in (False, True))
    assert not torch.equal(whole, drafted)
    assert (whole - drafted).abs().float().mean() < 1


SQUARE = images.ImageClassification(crop_size=32, resize_size=32)


@pytest.mark.parametrize("crop", [TrainingCrop(32), EvaluationCrop(SQUARE)])
def test_crops_take_tensors(crop):
    image = photo(40, 30)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    draw = Draw(1, 2, 3)
    assert torch.equal(crop(x, draw), crop(x / 255, draw))
    assert crop(x, draw).shape == (3, 32, 32)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\].*normalising is done later"):
        crop(x.float(), draw)
    with pytest.raises(ValueError, match="must be uint8 or floating point"):
        crop(x.long(), draw)


def test_training_crop_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"x\.pt: .*\[3,H,W\], got \(1, 8, 8\)"):
        TrainingCrop(8)(torch.zeros(1, 8, 8), name="x.pt")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_crop_is_torchvisions_resized_crop(interpolation):
    image = photo(97, 61)
    crop = TrainingCrop(40, interpolation=interpolation)
    for number in range(5):
        draw = Draw(0, 0, number)
        left, top, right, bottom = crop.box(97, 61, random.Random(draw.number()))
        expected = torchvision_functional.resized_crop(
            image, top, left, bottom - top, right - left, [40, 40], InterpolationMode(interpolation)
        )
        assert torch.equal(crop(image, draw), torchvision_functional.pil_to_tensor(expected))


def test_boxes_are_drawn_as_torchvision_draws_them():
    crop, generator = TrainingCrop(8), random.Random(0)
    ours = [crop.box(120, 90, generator) for _ in range(2000)]
    stock = RandomResizedCrop(8)
    theirs = [stock.get_params(torch.zeros(3, 90, 120), stock.scale, stock.ratio) for _ in ours]
    sides = np.array([(right - left, bottom - top) for left, top, right, bottom in ours])
    stock_sides = np.array([(w, h) for top, left, h, w in theirs])
    starts = np.array([box[:2] for box in ours])
    stock_starts = np.array([(left, top) for top, left, h, w in theirs])
    # 2,000 draws: the standard error of a mean is below 0.7 pixels, of a difference below 1.
    assert np.allclose(sides.mean(0), stock_sides.mean(0), atol=4)
    assert np.allclose(starts.mean(0), stock_starts.mean(0), atol=4)
    assert (sides.min(0) >= (19, 19)).all()
    assert (sides.max(0) <= (120, 90)).all()
    assert (starts + sides <= (120, 90)).all()


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 400), (400, 1), (2, 3)])
def test_boxes_of_extreme_images_lie_inside(width, height):
    for seed in range(20):
        left, top, right, bottom = TrainingCrop(8).box(width, height, random.Random(seed))
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_a_crop_depends_on_its_draw_alone(jpeg):
    crop = TrainingCrop(32)
    first = crop(jpeg, Draw(1, 2, 3))
    random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(pickle.loads(pickle.dumps(crop))(str(jpeg), Draw(1, 2, 3)), first)
    for other in (Draw(0, 2, 3), Draw(1, 0, 3), Draw(1, 2, 0), Draw(3, 2, 1)):
        assert not torch.equal(crop(jpeg, other), first)


def test_training_crop_decodes_smaller_where_the_part_allows(jpeg, monkeypatch):
    sizes = []
    part = decoding._part

    def recorded(image, *arguments):
        sizes.append(image.size)
        return part(image, *arguments)

    monkeypatch.setattr(decoding, "_part", recorded)
    whole = {"scale": (1.0, 1.0), "ratio": (4 / 3, 4 / 3)}
    small, large = (TrainingCrop(side, **whole)(jpeg, Draw()) for side in (93, 188))
    assert sizes == [(125, 94), (500, 375)]
    exact = TrainingCrop(93, **whole)(decode(jpeg), Draw())
    assert (small.int() - exact.int()).abs().float().mean() < 2
    assert large.shape == (3, 188, 188)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_draft_and_orientation_agree(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photo(160, 80), quality=95, exif=exif)
    upright = decode(content)
    assert upright.size == ((80, 160) if orientation > 4 else (160, 80))
    smaller = decode(content, least=20)
    assert smaller.size == tuple(side // 4 for side in upright.size)
    difference = np.asarray(upright.resize(smaller.size, Image.Resampling.BOX), float) - smaller
    assert abs(difference).mean() < 3
    crop = TrainingCrop(16, scale=(0.4, 0.6))
    exact, drafted = (crop(x, Draw(0, 0, 1)).int() for x in (upright, content))
    assert (exact - drafted).abs().float().mean() < 6


@pytest.mark.parametrize(
    ("least", "size"), [(301, (500, 300)), (150, (250, 150)), (151, (500, 300)), (1, (63, 38))]
)
def test_decode_keeps_the_least_side(least, size):
    assert decode(encoded(photo(500, 300)), least=least).size == size


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 0},
        {"scale": (0, 1)},
        {"scale": (0.5, 0.4)},
        {"scale": (0.5, 1.1)},
        {"ratio": (2, 1)},
    ],
)
def test_training_crop_refuses(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
        TrainingCrop(**{"size": 8, **arguments})


def test_unreadable_names_the_file(tmp_path):
    with pytest.raises(images.UnreadableImageError) as caught:
        decode(tmp_path / "gone.jpg")
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.path, error.reason) == (str(tmp_path / "gone.jpg"), "No such file or directory")
    with pytest.raises(images.UnreadableImageError, match=r"^shard/1\.jpg: not an image"):
        decode(b"text", name="shard/1.jpg")


def test_too_narrow_an_image_is_unreadable():
    crop = EvaluationCrop(images.ImageClassification(crop_size=224, resize_size=256))
    with pytest.raises(images.UnreadableImageError, match=r"^a\.png: .* is too narrow"):
        crop(encoded(photo(5000, 1), "PNG"), name="a.png")


def test_draws_do_not_collide():
    draws = [Draw(s, e, i).number() for s in range(4) for e in range(4) for i in range(64)]
    assert len(set(draws)) == len(draws)
    assert math.log2(max(draws)) > 60
