"""Encoders in segmentation_models_pytorch: its `tu-` ones, and ours in the place of its own."""

from __future__ import annotations

import copy

import pytest
import torch

import effnet_fast
import foreign_networks
from effnet_fast import EfficientNetFeatures, checkpoints
from networks import random_images
from tolerances import assert_parity

smp = pytest.importorskip(
    "segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed"
)


@pytest.fixture(autouse=True)
def registered() -> None:
    effnet_fast.register_timm()


class Encoder(torch.nn.Module):
    """Our encoder as smp's decoders take it: the images come before the maps."""

    def __init__(self, maps: EfficientNetFeatures) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x, *self.maps(x)]


def unet(encoder: str) -> torch.nn.Module:
    return smp.Unet(f"tu-{encoder}", encoder_weights=None, classes=2)


def run(model: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    y = model(x)
    y.square().mean().backward()
    first = next(model.encoder.parameters())
    return {
        "output": y.detach(),
        "grad stem": first.grad,
        "grad decoder": next(model.decoder.parameters()).grad,
    }


@pytest.mark.parametrize("training", [False, True])
def test_a_unet_computes_what_it_does_on_timms_network(training):
    theirs = unet("efficientnet_b0").train()
    with torch.no_grad():
        theirs(torch.randn(4, 3, 64, 64))  # statistics that fit
    theirs.train(training)
    ours = unet("effnet_fast_b0").train(training)
    ours.load_state_dict(theirs.state_dict() | _encoder(theirs), strict=False)
    assert ours.encoder.out_channels == theirs.encoder.out_channels
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(2, 3, 64, 64)
    assert_parity(run(ours, x), run(theirs, x), run(exact, x.double()))


def _encoder(theirs: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = checkpoints.convert(theirs.encoder.model.state_dict(), to="torchvision")
    return {f"encoder.model.{key}": value for key, value in state.items()}


def test_published_weights_and_channels():
    model = smp.FPN("tu-effnet_fast_lite0", encoder_weights=True, in_channels=4)
    own = effnet_fast.efficientnet_lite0(weights="DEFAULT", in_chans=4, features_only=True)
    assert torch.equal(model.encoder.model.features[0][0].weight, own.features[0][0].weight)
    assert model.eval()(torch.randn(1, 4, 64, 64)).shape == (1, 1, 64, 64)
    found = smp.encoders.get_preprocessing_params("tu-effnet_fast_lite0")
    assert tuple(found["mean"]) == own.variant.mean


@pytest.mark.parametrize(
    ("name", "family", "endpoints"),
    [
        ("efficientnet-b0", "smp", "smp"),
        ("efficientnet-b1", "smp", "smp"),  # built for 240 pixels: SAME padding of odd sides
        ("timm-efficientnet-b0", "timm", "smp_timm"),
        ("timm-tf_efficientnet_lite0", "timm", "smp_timm"),
    ],
)
def test_a_trained_unet_keeps_its_numbers_with_our_encoder(tmp_path, name, family, endpoints):
    torch.manual_seed(0)
    theirs = smp.Unet(name, encoder_weights=None, classes=2)
    theirs.train()(random_images(4, 64))  # statistics that fit
    foreign_networks.calibrate(theirs, 64)
    torch.save(theirs.encoder.state_dict(), tmp_path / "encoder.pth")
    maps = EfficientNetFeatures.from_checkpoint(
        tmp_path / "encoder.pth", family=family, endpoints=endpoints
    )
    assert [3, *maps.feature_info.channels()] == theirs.encoder.out_channels
    exact = copy.deepcopy(theirs).double()
    ours = copy.deepcopy(theirs)
    ours.encoder = Encoder(maps).eval()
    for side in (64, 96):
        x = random_images(2, side)
        with torch.no_grad():
            assert_parity({"y": ours(x)}, {"y": theirs(x)}, {"y": exact(x.double())})


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_smps_encoders_of_less_depth(depth):
    for name, endpoints in (("efficientnet-b0", "smp"), ("timm-efficientnet-b0", "smp_timm")):
        theirs = smp.encoders.get_encoder(name, weights=None, depth=depth)
        ours = effnet_fast.efficientnet_b0(
            features_only=True, out_indices=range(depth), endpoints=endpoints
        )
        x = torch.randn(1, 3, 64, 64)
        assert [m.shape for m in ours.eval()(x)] == [m.shape for m in theirs.eval()(x)[1:]]
