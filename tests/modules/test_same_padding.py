"""SAME padding: TensorFlow's rule, timm's layer, and the fused path without a padded copy."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_fast import EfficientNet, doctor, use_backend
from effnet_fast.models import VARIANTS
from effnet_fast.modules.layers import Conv2dNormActivation, MBConvConfig
from effnet_fast.modules.same_padding import Conv2dSame, same_padding
from networks import TINY, pair, random_images, trio

TINY_SAME = replace(TINY, padding="same")
B0_SAME = replace(VARIANTS["b0"], padding="same")
SIDES = [48, 49]


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_rule(kernel, stride):
    for size in range(1, 20):
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        assert same_padding(size, kernel, stride) == (total // 2, total - total // 2)


def test_published_kernels():
    assert same_padding(224, 3, 2) == (0, 1)
    assert same_padding(224, 5, 2) == (1, 2)
    assert same_padding(225, 3, 2) == (1, 1)
    assert same_padding(225, 5, 2) == (2, 2)


@pytest.mark.parametrize("kernel", [1, 3, (3, 5)])
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_layer_is_timms(kernel, stride, dilation):
    from timm import layers

    options = {"stride": stride, "dilation": dilation, "groups": 2}
    ours, theirs = Conv2dSame(4, 6, kernel, **options), layers.Conv2dSame(4, 6, kernel, **options)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for side in range(1, 9):
        x = torch.randn(2, 4, side, side + 3)
        assert torch.equal(ours(x), theirs(x))


def test_layer_keeps_channels_last_and_names_its_padding():
    conv = Conv2dSame(4, 8, 3, 2)
    y = conv(torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert repr(conv).endswith("padding=same)")
    with pytest.raises(TypeError, match="padding"):
        Conv2dSame(4, 8, 3, padding=1)  # type: ignore[call-arg]


def test_only_layers_that_stride_differ():
    def convolution(**options: int) -> nn.Module:
        return Conv2dNormActivation(4, 4, padding="same", **options)[0]

    assert type(convolution(stride=2)) is Conv2dSame
    plain = convolution(stride=1, kernel_size=5)
    assert type(plain) is nn.Conv2d
    assert plain.padding == (2, 2)
    model = EfficientNet(TINY_SAME)
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        assert (type(conv) is Conv2dSame) == (conv.stride == (2, 2))
    assert list(model.state_dict()) == list(EfficientNet(TINY).state_dict())


def test_refuses_unknown_padding():
    with pytest.raises(
        ValueError, match="padding must be one of symmetric, same, even, got 'valid'"
    ):
        MBConvConfig(6, 3, 1, 8, 8, padding="valid")
    with pytest.raises(ValueError, match="padding must be one of"):
        replace(VARIANTS["b0"], padding="valid")


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_computes_what_stock_does(side, train):
    pair(TINY_SAME, side).train(train).assert_alike(random_images(4, side))


@pytest.mark.exhaustive
def test_eval_backward_parity():
    trio(B0_SAME, 112).assert_parity(*random_images(8, 112).split(2))


@pytest.mark.slow
def test_train_step_parity():
    trio(B0_SAME, 112).train().assert_parity(*random_images(12, 112).split(4))


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_inference_parity(side):
    with torch.inference_mode():
        trio(B0_SAME, side).assert_parity(random_images(4, side), backward=False)


def pads(model: nn.Module, x: Tensor) -> int:
    """How often a tensor is copied for its padding, once the weights are packed."""
    with torch.inference_mode():
        model(x)
        with torch.profiler.profile() as profile:
            model(x)
    events = profile.key_averages()
    return sum(event.count for event in events if event.key == "aten::constant_pad_nd")


def test_no_padded_copies():
    model = EfficientNet(TINY_SAME).eval()
    blocks = TINY.blocks + 2  # the stem and the head
    assert f"{blocks} of {blocks} blocks fused" in str(doctor(model))
    x = random_images(1, 48)
    assert pads(model, x) == 0  # the network in one call
    model.plan = False
    assert pads(model, x) == 0
    with use_backend("reference"):
        assert pads(model, x) == 5  # every layer that strides
    x = random_images(1, 49)
    assert pads(model, x) == 0


@pytest.mark.parametrize("padding", [(1, 1), (2, 0), "same"])
def test_padding_beside_its_own_runs_as_stock(padding):
    """Which adds it to the other, or refuses it by its name."""
    model, x = EfficientNet(TINY_SAME).eval(), random_images(1, 48)
    with torch.no_grad():
        before = model(x)
        model.features[2][0].block[1][0].padding = padding
        with use_backend("reference"):
            expected = outcome(model, x)
        assert isinstance(expected, str) == isinstance(padding, str)
        found = outcome(model, x)
        assert found == expected if isinstance(found, str) else torch.allclose(found, expected)
        model.features[2][0].block[1][0].padding = (0, 0)
        assert torch.equal(model(x), before)


def outcome(model, x):
    """The result, or the text of the error."""
    try:
        return model(x)
    except RuntimeError as error:
        return str(error)


@pytest.fixture(scope="module")
def network():
    return EfficientNet(TINY_SAME).eval().requires_grad_(False)


def assert_follows_the_input(captured, network):
    """The padding of what was captured at one size must be right at others."""
    for height, width in ((48, 49), (49, 48), (53, 62)):
        x = random_images(1, 64)[:, :, :height, :width]
        with use_backend("reference"):
            torch.testing.assert_close(captured(x), network(x))


@pytest.mark.slow
def test_export_with_sizes_unknown(network):
    """All sizes of a range: none may be left out for what cannot be proved about it."""
    height, width = (torch.export.Dim(side, min=33, max=256) for side in ("height", "width"))
    shapes = ({2: height, 3: width},)
    program = torch.export.export(network, (random_images(1, 48),), dynamic_shapes=shapes)
    assert_follows_the_input(program.module(), network)


def test_layer_in_fx_and_torchscript():
    conv = Conv2dSame(3, 4, 3, 2).requires_grad_(False)
    assert_follows_the_input(torch.fx.symbolic_trace(nn.Sequential(conv)), conv)
    assert_follows_the_input(torch.jit.trace(conv, random_images(1, 48)), conv)


def test_padding_is_zero_after_the_activation():
    """silu(shift) of what lies outside the image would show at the borders."""
    layer = Conv2dNormActivation(
        4, 4, 3, 2, padding="same", groups=4, activation_layer=nn.SiLU
    ).eval()
    layer[1].bias.data.fill_(3.0)
    x = random_images(1, 6, channels=4).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        y = F.conv2d(F.pad(x, (0, 1, 0, 1)), layer[0].weight, stride=2, groups=4)
        torch.testing.assert_close(layer(x), F.silu(layer[1](y)))
