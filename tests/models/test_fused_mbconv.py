"""FusedMBConv, and networks that begin with it, against torchvision's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.models import efficientnet as torchvision_efficientnet

import networks
from effnet_fast.models import EfficientNet, EfficientNetFeatures, Stage, custom_variant
from effnet_fast.modules.fused_mbconv import FusedMBConv
from effnet_fast.modules.layers import MBConvConfig
from networks import TINY_V2, random_images, rms, run_network

# ratio, stride, channels in and out: with and without projection and residual.
BLOCKS = [(1, 1, 8, 8), (1, 2, 8, 16), (4, 1, 8, 8), (4, 2, 8, 16), (4, 1, 8, 16)]


def assert_alike(actual: nn.Module, stock: nn.Module, x: torch.Tensor) -> None:
    networks.assert_alike(run_network(actual, x), run_network(stock, x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("row", BLOCKS, ids=str)
def test_block(row: tuple[int, int, int, int], training: bool) -> None:
    ratio, stride, channels, width = row
    torch.manual_seed(0)
    ours = FusedMBConv(MBConvConfig(ratio, 3, stride, channels, width), 0.3, nn.BatchNorm2d)
    torch.manual_seed(0)
    config = torchvision_efficientnet.FusedMBConvConfig(ratio, 3, stride, channels, width, 1)
    theirs = torchvision_efficientnet.FusedMBConv(config, 0.3, nn.BatchNorm2d)
    assert str(ours) == str(theirs)
    pairs = zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert_alike(ours.train(training), theirs.train(training), torch.randn(4, channels, 9, 12))


def test_block_leaves_its_input_alone() -> None:
    block = FusedMBConv(MBConvConfig(1, 3, 1, 8, 8), 0.0, nn.BatchNorm2d).eval()
    x = torch.randn(1, 8, 5, 5)
    before = x.clone()
    block(x)
    assert torch.equal(x, before)


def test_refuses_a_kernel_of_one() -> None:
    with pytest.raises(ValueError, match="kernel of a FusedMBConv must be at least 3, got 1"):
        FusedMBConv(MBConvConfig(4, 1, 1, 8, 8), 0.0, nn.BatchNorm2d)


def test_refuses_an_unknown_kind_of_stage() -> None:
    with pytest.raises(ValueError, match="kind must be one of mbconv, fused, got 'dense'"):
        Stage(1, 3, 1, 8, 8, 1, "dense")


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_network(padding: str) -> None:
    models = networks.trio(replace(TINY_V2, padding=padding), 49 if padding == "symmetric" else 48)
    x = random_images(8, 48, seed=1)
    models.assert_parity(*x.split(4))
    networks.Pair(models.actual, models.stock).train().assert_alike(x)


def test_swapped_channels_are_noticed() -> None:
    models = networks.trio(TINY_V2)
    weight = models.actual.get_submodule("features.2.1.block.0.0").weight
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]]
    with pytest.raises(AssertionError, match=r"^y: "):
        models.assert_parity(random_images(4, 48), backward=False)


def test_own_stages() -> None:
    stages = (Stage(2, 5, 2, 8, 16, 2, "fused"), Stage(4, 3, 2, 16, 24, 1))
    variant = replace(custom_variant(stages=stages, resolution=40), width=1.0)
    models = networks.pair(replace(variant, name="own"))
    models.assert_alike(random_images(2, 40))


def test_encoder_gives_the_classifiers_maps() -> None:
    torch.manual_seed(0)
    whole = EfficientNet(TINY_V2).eval()
    encoder = EfficientNetFeatures(TINY_V2, out_indices=(0, 2)).eval()
    encoder.load_state_dict(whole.state_dict())
    x = random_images(2, 48)
    with torch.inference_mode():
        for actual, expected in zip(
            encoder(x), whole.forward_intermediates(x, [0, 2], intermediates_only=True), strict=True
        ):
            assert rms(actual - expected) <= 1e-5 * rms(expected)


def test_modes_reach_every_block() -> None:
    model = EfficientNet(TINY_V2, memory="lean")
    model.set_grad_checkpointing()
    blocks = [module for module in model.modules() if isinstance(module, FusedMBConv)]
    assert len(blocks) == 5
    assert all(block.memory == "lean" and block.grad_checkpointing for block in blocks)


def test_gradient_checkpointing_changes_nothing() -> None:
    models = networks.pair(TINY_V2).train()
    models.actual.set_grad_checkpointing()
    models.assert_alike(random_images(4, 48))


@pytest.mark.slow
def test_scripts_and_compiles() -> None:
    model = EfficientNet(TINY_V2).eval()
    x = random_images(1, 48)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
