"""MONAI's EfficientNetBN: names, padding that is fixed for one side, and both ways."""

from dataclasses import replace

import pytest
import torch

from effnet_fast import EfficientNet, checkpoints
from effnet_fast.models import VARIANTS
from foreign_logits import assert_same_logits
from networks import TINY, calibrated_state

WHY = "MONAI is not installed: its names are written by hand in the other tests"
SIDES = (64, 65, 96)
B0 = replace(VARIANTS["b0"], padding="same", bn_eps=1e-3)


def test_names_have_the_stage_and_count_through():
    tiny = EfficientNet(TINY, num_classes=4).state_dict()
    named = checkpoints.convert(tiny, "monai")
    blocks = list(dict.fromkeys(key.split("._")[0] for key in named if key.startswith("_blocks")))
    expected, index = [], 0
    for number, stage in enumerate(TINY.stages):
        expected += [f"_blocks.{number}.{index + i}" for i in range(stage.repeats)]
        index += stage.repeats
    assert blocks == expected
    assert named["_fc.weight"] is tiny["classifier.1.weight"]
    assert list(checkpoints.convert(named)) == list(tiny)


def test_a_block_that_is_missing_is_named(tmp_path):
    named = checkpoints.convert(EfficientNet(TINY).state_dict(), "monai")
    torch.save({k: v for k, v in named.items() if "_blocks.1.1." not in k}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: no tensors of the block before _blocks\.2\.2"):
        checkpoints.load(tmp_path / "a.pth")


def test_what_the_family_brings(tmp_path):
    state = EfficientNet("b0", num_classes=2).state_dict()
    torch.save(checkpoints.convert(state, "monai"), tmp_path / "a.pth")
    checkpoint = checkpoints.open_checkpoint(tmp_path / "a.pth")
    assert (checkpoint.family, checkpoint.naming) == ("monai", "monai")
    variant = EfficientNet.from_checkpoint(tmp_path / "a.pth").variant
    assert (variant.padding, variant.padded_as, variant.bn_eps) == ("same", 224, 1e-3)
    assert variant.bn_momentum == 0.01
    # Copies of the same names under lukemelas's pad by each image's size.
    torch.save(checkpoints.convert(state, "lukemelas"), tmp_path / "b.pth")
    assert EfficientNet.from_checkpoint(tmp_path / "b.pth").variant.padded_as is None


@pytest.mark.slow
def test_both_ways(tmp_path):
    nets = pytest.importorskip("monai.networks.nets", reason=WHY)
    state = calibrated_state(B0, max(SIDES))
    theirs = nets.EfficientNetBN("efficientnet-b0", pretrained=False).eval()
    named = checkpoints.convert(state, "monai")
    assert list(named) == list(theirs.state_dict())
    theirs.load_state_dict(named)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    ours = EfficientNet.from_checkpoint(tmp_path / "a.pth").eval()
    assert_same_logits(ours, theirs, SIDES)


def test_no_3d(tmp_path):
    named = checkpoints.convert(EfficientNet("b0", num_classes=2).state_dict(), "monai")
    named = {k: v[..., None] if v.dim() == 4 else v for k, v in named.items()}
    torch.save(named, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: .*not four dimensions|a\.pth: .*instead of"):
        EfficientNet.from_checkpoint(tmp_path / "a.pth")
