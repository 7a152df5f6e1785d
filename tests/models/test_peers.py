"""Logits of `EfficientNet.from_checkpoint` against those of the families' own packages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peers
import tiers
from effnet_fast import EfficientNet, checkpoints, use_backend
from networks import CALIBRATION_IMAGES, PUBLISHED, random_images, rms
from tolerances import assert_no_worse_than

SIDES = (64, 65)  # SAME differs from symmetric padding at even sizes alone
DOUBLE = 1e-10  # relative error of two orders of addition in float64
IMAGES = 3
FAMILIES_AND_SIZES = [
    pytest.param(family, *param.values, marks=param.marks)
    for family in peers.RUNNABLE
    for param in tiers.some(PUBLISHED, ["b0"])
    if peers.has(family, *param.values)
]


def save(state: dict[str, Tensor], family: str, folder: Path) -> Path:
    path = folder / "weights.pth"
    torch.save(checkpoints.convert(state, family), path)
    return path


def run_all(model: nn.Module, images: list[Tensor]) -> Tensor:
    """Logits of the batches in turn, one after the other."""
    return torch.cat([run(model, x) for x in images])


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x).clone()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "size"), FAMILIES_AND_SIZES)
def test_logits(size, family, tmp_path):
    state = peers.state_of(family, size, SIDES[1])
    ours = EfficientNet.from_checkpoint(save(state, family, tmp_path), family=family).eval()
    theirs = peers.peer(family, size, state)
    assert ours.variant.name == size
    # Some of those of the calibration: with others some logits of B7 are a thousand times larger.
    images = random_images(CALIBRATION_IMAGES, SIDES[1], seed=1)[:IMAGES]
    images = [images[:, :, :side, :side] for side in SIDES]
    layouts = (torch.contiguous_format, torch.channels_last)
    actual = run_all(ours, images)
    stock = [run_all(theirs, [x.to(memory_format=layout) for x in images]) for layout in layouts]
    ours.double(), theirs.double()
    images = [x.double() for x in images]
    exact = run_all(theirs, images)
    torch.testing.assert_close(run_all(ours, images), exact, rtol=DOUBLE, atol=DOUBLE * rms(exact))
    worse = max(stock, key=lambda logits: rms(logits - exact))
    assert_no_worse_than(actual, worse, exact)
    assert rms(exact[0] - exact[1]) > 100 * rms(worse - exact)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["timm", "nvidia", "torchvision"])
def test_another_family_gives_other_logits(wrong, tmp_path):
    path = save(peers.state_of("timm_tf", "b0", SIDES[1]), "timm", tmp_path)
    right, other = (
        EfficientNet.from_checkpoint(path, family=family).eval() for family in ("timm_tf", wrong)
    )
    for side, same_padding in zip(SIDES, (False, True), strict=True):
        x = random_images(IMAGES, side)
        expected, actual = run(right, x), run(other, x)
        # NVIDIA's networks have the same eps, and odd sides are padded alike.
        alike = same_padding and wrong == "nvidia"
        assert (rms(actual - expected) < 1e-5 * rms(expected)) == alike


@pytest.mark.slow
@pytest.mark.parametrize("family", ["timm_tf", "lukemelas"])
def test_oblong_images_and_the_reference(family, tmp_path):
    state = peers.state_of(family, "b0", SIDES[1])
    ours = EfficientNet.from_checkpoint(save(state, family, tmp_path), family=family).eval()
    theirs = peers.peer(family, "b0", state)
    x = random_images(IMAGES, 96)[:, :, :75, :94]
    expected = run(theirs, x)
    assert rms(run(ours, x) - expected) <= 1e-5 * rms(expected)
    with use_backend("reference"):
        assert rms(run(ours, x) - expected) <= 1e-5 * rms(expected)
