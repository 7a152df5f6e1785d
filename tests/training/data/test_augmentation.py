"""Augmentation of batches: what each kind does, and that its random numbers are its own."""

import pytest
import torch

from effnet_fast.pretrained.images import MEAN, STD, ImageClassification
from effnet_fast.training.data.augmentation import Augmentation

ALL = {"randaugment": (2, 9), "mixup": 0.2, "cutmix": 1.0, "erasing": 0.5}
ZERO = {"mean": (0.0,) * 3, "std": (1.0,) * 3}  # pixels stay in [0, 1]


def augment(**options):
    return Augmentation(**{"mean": MEAN, "std": STD, "num_classes": 4, **options})


def batch(count=8, side=16):
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    return images.contiguous(memory_format=torch.channels_last), torch.arange(count) % 4


def colours(count=8, side=16):
    """Image i is of the colour of its class, which is i: its pixels tell whose they are."""
    labels = torch.arange(count)
    images = (labels * 25).to(torch.uint8)[:, None, None, None].expand(count, 3, side, side)
    return images, labels


def test_without_flip_it_is_the_presets_normalisation():
    images, labels = batch()
    x, targets = augment(flip=0.0)(images, labels)
    preset = ImageClassification(crop_size=16, resize_size=16)
    assert torch.equal(x, preset.normalise(images))
    assert torch.equal(targets, labels)
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_flip_mirrors_whole_images():
    images, labels = batch(64)
    x, _ = augment(flip=0.5)(images, labels)
    plain, _ = augment(flip=0.0)(images, labels)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(x, plain, strict=True)]
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, x, plain, strict=True))
    assert 16 < sum(mirrored) < 48
    assert torch.equal(augment(flip=1.0)(images, labels)[0], plain.flip(-1))


def shares(x, count, side):
    """Of each image, the share of pixels of each colour."""
    found = (x[:, 0] * 255 / 25).round().long().flatten(1)
    return torch.stack([(found == k).float().mean(1) for k in range(count)], 1)


def test_cutmix_pastes_the_share_that_the_targets_say():
    images, labels = colours()
    pasted = 0
    for seed in range(8):
        mix = augment(cutmix=1.0, flip=0.0, num_classes=8, seed=seed, **ZERO)
        x, targets = mix(images, labels)
        assert torch.allclose(shares(x, 8, 16), targets, atol=1e-6)
        assert torch.allclose(targets.sum(1), torch.ones(8))
        pasted += int(((targets > 0).sum(1) == 2).sum())
    assert pasted > 32


def test_mixup_blends_as_the_targets_say():
    images, labels = colours()
    x, targets = augment(mixup=1.0, flip=0.0, num_classes=8, **ZERO)(images, labels)
    expected = targets @ (labels.float() * 25 / 255)
    assert torch.allclose(x[:, 0, 0, 0], expected, atol=1e-6)
    assert ((targets > 0.01).sum(1) == 2).all()
    assert torch.allclose(targets.sum(1), torch.ones(8))


def test_both_mixes_take_turns():
    images, labels = colours()
    mix = augment(mixup=1.0, cutmix=1.0, flip=0.0, num_classes=8, **ZERO)
    kinds = set()
    for _ in range(16):
        x, _ = mix(images, labels)
        kinds.add(bool((x[:, 0].flatten(1).std(1) > 0).any()))  # cutmix alone has edges
    assert kinds == {True, False}


def test_erasing_leaves_the_mean_colour():
    images, labels = batch(32, 32)
    x, _ = augment(erasing=0.5, flip=0.0)(images, labels)
    plain, _ = augment(flip=0.0)(images, labels)
    gone = (x == 0).all(1)
    assert torch.equal(torch.where(gone[:, None], plain, x), plain)
    share = gone.float().mean((1, 2))
    assert 6 < int((share > 0).sum()) < 26
    assert share.max() < 0.4


def test_randaugment_changes_images_and_stays_in_range():
    images, labels = batch(16)
    changed = 0
    augmentation = augment(randaugment=(2, 9), flip=0.0, **ZERO)
    for _ in range(4):
        x, targets = augmentation(images, labels)
        assert x.shape == images.shape
        assert x.min() >= 0
        assert x.max() <= 1
        changed += int((x != images / 255).flatten(1).any(1).sum())
    assert changed > 32
    assert torch.equal(targets, labels)


@pytest.mark.parametrize("options", [{}, ALL], ids=["core", "kornia"])
def test_random_numbers_are_its_own(options):
    images, labels = batch()
    first, again, other = (augment(seed=seed, **options) for seed in (1, 1, 2))
    state = torch.get_rng_state()
    x, targets = first(images, labels)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    y, same = again(images, labels)
    assert torch.equal(x, y)
    assert torch.equal(targets, same)
    assert not torch.equal(other(images, labels)[0], x)
    assert not torch.equal(first(images, labels)[0], x)


def test_its_state_is_kept_with_the_others():
    images, labels = batch()
    first = augment(seed=1, **ALL)
    first(images, labels)
    state = {name: value.clone() for name, value in first.state_dict().items()}
    expected = first(images, labels)
    second = augment(seed=5, **ALL)
    second.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(second(images, labels), expected, strict=True))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_small_batches(count):
    images, labels = batch(count)
    x, targets = augment(**ALL)(images, labels)
    assert x.shape == (count, 3, 16, 16)
    assert len(targets) == count


@pytest.mark.parametrize(
    "options",
    [{"flip": 1.5}, {"erasing": -0.1}, {"mixup": -1.0}, {"cutmix": float("nan")},
     {"randaugment": (0, 9)}, {"randaugment": (2, 30)}],
)  # fmt: skip
def test_refuses(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        augment(**options)
