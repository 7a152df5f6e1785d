"""The modules of layers.py on their own."""

from __future__ import annotations

import functools
import pickle

import pytest
import torch
from torch import nn
from torchvision import ops
from torchvision.models._utils import _make_divisible

from effnet_fast import backends
from effnet_fast.modules import fused_forward
from effnet_fast.modules.explain import explain
from effnet_fast.modules.layers import (
    Conv2dNormActivation,
    MBConv,
    MBConvConfig,
    SqueezeExcitation,
)
from effnet_fast.modules.stochastic_depth import StochasticDepth, stochastic_depth
from effnet_fast.modules.widths import round_channels
from parity import NEEDS_SIMT


def test_round_channels_as_torchvision() -> None:
    for channels in range(1, 700):
        for width in (0.25, 1.0, 1.1, 1.4, 2.0, 4.3):
            assert round_channels(channels * width) == _make_divisible(channels * width, 8)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stride", 3),
        ("stride", 0),
        ("kernel", 4),
        ("kernel", 0),
        ("input_channels", 0),
        ("out_channels", -8),
        ("expand_ratio", 0),
    ],
)
def test_config_refuses(field: str, value: int) -> None:
    fields = {
        "expand_ratio": 6,
        "kernel": 3,
        "stride": 1,
        "input_channels": 16,
        "out_channels": 16,
    }
    with pytest.raises(ValueError, match=f"(?=.*{field}).*must be .*got .*{value}"):
        MBConvConfig(**{**fields, field: value})


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"norm_layer": None},
        {"activation_layer": None},
        {"bias": True, "dilation": 2},
        {"kernel_size": 5, "stride": 2, "groups": 4, "padding": 0},
        {"activation_layer": nn.Sigmoid, "inplace": None},
        {"norm_layer": functools.partial(nn.GroupNorm, 2)},
    ],
    ids=lambda kwargs: "_".join(kwargs) or "default",
)
def test_conv_norm_activation_as_torchvision(kwargs: dict[str, object]) -> None:
    torch.manual_seed(1)
    ours = Conv2dNormActivation(8, 12, **kwargs)  # type: ignore[arg-type]
    torch.manual_seed(1)
    theirs = ops.Conv2dNormActivation(8, 12, **kwargs)
    assert str(ours) == str(theirs)
    x = torch.randn(2, 8, 9, 7)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@NEEDS_SIMT
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_layer_on_the_cuda_kernels(
    kernel: int, stride: int, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    run = fused_forward.dwconv_bn_silu
    monkeypatch.setattr(
        fused_forward, "dwconv_bn_silu", lambda *a: used.append(a[-1].backend) or run(*a)
    )
    layer = Conv2dNormActivation(16, 16, kernel, stride, groups=16, activation_layer=nn.SiLU)
    layer.train(training)
    x = torch.randn(2, 16, 9, 8).to(memory_format=torch.channels_last)
    with backends.use_backend("simt"):
        assert explain(layer) is None
        y = layer(x)
    assert used == ["simt"]
    torch.testing.assert_close(y, layer.forward_stock(x))


@NEEDS_SIMT
def test_depthwise_layer_that_the_cuda_kernels_lack() -> None:
    layer = Conv2dNormActivation(16, 16, 7, groups=16, activation_layer=nn.SiLU)
    x = torch.randn(2, 16, 9, 8).to(memory_format=torch.channels_last)
    with backends.use_backend("simt"):
        assert explain(layer) == "the kernel is 7x7; simt has 3x3 and 5x5"
        with pytest.raises(RuntimeError, match="the kernel is 7x7; simt has 3x3 and 5x5"):
            layer(x)
        block = MBConv(MBConvConfig(6, 3, 1, 16, 16), 0.0, nn.BatchNorm2d)
        assert explain(block) == "this version has no CUDA kernel for mbconv"


def test_conv_norm_activation_slices_to_plain_sequential() -> None:
    layer = Conv2dNormActivation(3, 8, activation_layer=nn.SiLU)
    head = layer[:2]
    assert type(head) is nn.Sequential
    assert head[0] is layer[0]
    assert head[1] is layer[1]
    assert len(layer[2:]) == 1
    assert layer[-1] is layer[2]
    layer[1] = nn.Identity()
    assert type(layer[1]) is nn.Identity
    del layer[2]
    assert [name for name, _ in layer.named_children()] == ["0", "1"]
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(layer(x), layer[0](x))


def test_subclasses_keep_their_forward() -> None:
    class Doubled(Conv2dNormActivation):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Shifted(MBConv):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    class Half(SqueezeExcitation):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2

    x = torch.randn(2, 8, 6, 6)
    doubled = Doubled(8, 8).eval()
    torch.testing.assert_close(doubled(x), 2 * doubled.forward_stock(x))
    config = MBConvConfig(6, 3, 1, 8, 8)
    plain = MBConv(config, 0.0, nn.BatchNorm2d).eval()
    shifted = Shifted(config, 0.0, nn.BatchNorm2d, se_layer=Half).eval()
    shifted.load_state_dict(plain.state_dict())
    assert isinstance(shifted.block[2], Half)
    se = plain.block[2]
    plain.block[2] = nn.Sequential(se, Scale(0.5))
    torch.testing.assert_close(shifted(x), plain(x) + 1)


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_squeeze_excitation_as_torchvision() -> None:
    for activation in (nn.ReLU, nn.SiLU):
        torch.manual_seed(1)
        ours = SqueezeExcitation(8, 2, activation=activation)
        torch.manual_seed(1)
        theirs = ops.SqueezeExcitation(8, 2, activation=activation)
        x = torch.randn(2, 8, 5, 6)
        torch.testing.assert_close(ours(x), theirs(x))
        assert ours.gate(x).shape == (2, 8, 1, 1)
        assert str(ours) == str(theirs)


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_stochastic_depth_draws_as_torchvision(mode: str, p: float, training: bool) -> None:
    x = torch.randn(16, 4, 3, 3)
    torch.manual_seed(5)
    ours = StochasticDepth(p, mode).train(training)(x)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    theirs = ops.StochasticDepth(p, mode).train(training)(x)
    assert torch.equal(ours, theirs)
    assert torch.equal(state, torch.get_rng_state())


def test_stochastic_depth_refuses() -> None:
    x = torch.ones(2, 1)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        stochastic_depth(x, 1.5, "row")
    with pytest.raises(ValueError, match=r"'batch', 'row'.*got 'column'"):
        stochastic_depth(x, 0.5, "column")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("expand_ratio", [1, 6])
def test_block_leaves_its_input_alone(expand_ratio: int, stride: int, training: bool) -> None:
    block = MBConv(MBConvConfig(expand_ratio, 3, stride, 8, 8), 0.0, nn.BatchNorm2d)
    x = torch.randn(2, 8, 6, 6)
    before, version = x.clone(), x._version
    y = block.train(training)(x)
    assert torch.equal(x, before)
    assert x._version == version
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    y.zero_()
    assert torch.equal(x, before)


def test_emptied_block_does_not_overwrite_its_input() -> None:
    block = MBConv(MBConvConfig(6, 3, 1, 8, 8), 0.0, nn.BatchNorm2d).eval()
    block.block = nn.Identity()
    x = torch.randn(2, 8, 6, 6)
    before = x.clone()
    torch.testing.assert_close(block(x), 2 * before)
    assert torch.equal(x, before)


@torch.no_grad()
@pytest.mark.parametrize("expand_ratio", [1, 6])
def test_each_norm_of_a_block_has_its_own_eps(expand_ratio: int) -> None:
    block = MBConv(MBConvConfig(expand_ratio, 3, 1, 8, 8), 0.0, nn.BatchNorm2d).eval()
    for i, bn in enumerate(m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.eps = 0.1 * 4**i
    x = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last)
    with backends.use_backend("reference"):
        stock = block(x)
    torch.testing.assert_close(block(x), stock, rtol=1e-4, atol=1e-5)


def test_block_is_pickled_whole() -> None:
    block = MBConv(MBConvConfig(6, 5, 2, 8, 16), 0.1, nn.BatchNorm2d).eval()
    x = torch.randn(1, 8, 7, 7)
    y = block(x)
    copy = pickle.loads(pickle.dumps(block))
    assert torch.equal(copy(x), y)
