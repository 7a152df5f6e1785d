"""segmentation_models_pytorch's `tu-` encoders, against its own use of timm's EfficientNet."""

from __future__ import annotations

import copy

import pytest
import torch

import effnet_fast
from effnet_fast import checkpoints
from tolerances import assert_parity

smp = pytest.importorskip(
    "segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed"
)


@pytest.fixture(autouse=True)
def registered() -> None:
    effnet_fast.register_timm()


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
