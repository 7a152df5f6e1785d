"""What modules are read as: geometry, blocks and classes that nobody reads."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from effnet_fast import use_backend
from effnet_fast.modules import structure
from effnet_fast.modules.layers import Conv2dNormActivation, MBConv, MBConvConfig


def layer(kernel: int, stride: int, padding: str | int | None) -> Conv2dNormActivation:
    return Conv2dNormActivation(3, 4, kernel, stride, padding, activation_layer=nn.SiLU)


@pytest.mark.parametrize("padding", ["same", None, 0, 3], ids=str)
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_geometry_is_that_of_the_convolution(kernel: int, stride: int, padding: str | int) -> None:
    module = layer(kernel, stride, padding)
    geometry = structure.structure_of(module).geometry
    for height, width in itertools.product((5, 6, 7, 8, 9), (5, 8)):
        out = module[0](torch.zeros(1, 3, height, width)).shape[2:]
        assert geometry.out_size(height, width) == out
        left, right, top, bottom = geometry.sides(height, width)
        padded = torch.zeros(1, 3, height + top + bottom, width + left + right)
        weight = module[0].weight
        assert nn.functional.conv2d(padded, weight, None, stride).shape[2:] == out
        assert padding == "same" or (left, top) == (right, bottom)


def test_an_image_below_the_kernel_has_no_output() -> None:
    assert min(structure.Geometry((5, 5), (2, 2), (1, 1, 1, 1)).out_size(2, 9)) < 1


def test_a_block_says_all_that_its_forward_needs() -> None:
    module = MBConv(MBConvConfig(6, 5, 1, 8, 8), 0.25, nn.BatchNorm2d)
    module.memory = "lean"
    block = structure.structure_of(module)
    assert isinstance(block, structure.Block)
    assert (block.residual, block.drop_probability, block.drop_mode) == (True, 0.25, "row")
    assert block.memory == "lean"
    assert block.excite.reduce_weight is module.block[2].fc1.weight
    assert block.excite.expand_bias is module.block[2].fc2.bias
    assert block.spatial is block.depthwise.geometry
    evaluated = structure.structure_of(module.eval())
    assert isinstance(evaluated, structure.Block)
    assert evaluated.drop_probability == 0


def test_a_subclass_is_read_by_nobody() -> None:
    class Own(Conv2dNormActivation):
        pass

    with pytest.raises(structure.RefusedError, match="Own is none of the classes"):
        structure.structure_of(Own(3, 4, activation_layer=nn.SiLU))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_autocast_is_asked_once(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = torch.is_autocast_enabled
    module = MBConv(MBConvConfig(6, 3, 1, 8, 8), 0.0, nn.BatchNorm2d).train(training)
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(
            torch, "is_autocast_enabled", lambda device: asked.append(device) or original(device)
        )
        assert module(x).dtype is torch.bfloat16
    assert asked == ["cpu"]


HIDDEN = {
    "weight": (lambda b: b.block[1][0], "weight", lambda v: v.detach() * -2),
    "norm": (lambda b: b.block[1][1], "bias", lambda v: v.detach() + 1),
    "statistic": (lambda b: b.block[1][1], "running_mean", lambda v: v + 1),
    "excite": (lambda b: b.block[2], "fc1", lambda v: copy.deepcopy(v).requires_grad_(False)),
    "child": (lambda b: b, "block", lambda v: nn.Sequential(*v, nn.Tanh())),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_an_attribute_that_hides_an_entry_is_what_runs(name: str) -> None:
    """Python finds an instance's `__dict__` before its tables."""
    block = MBConv(MBConvConfig(6, 3, 1, 8, 8), 0.0, nn.BatchNorm2d).eval()
    owner, attribute, change = HIDDEN[name]
    part = owner(block)
    with torch.no_grad():
        value = change(getattr(part, attribute))
        if name == "excite":
            value.weight += 1
    object.__setattr__(part, attribute, value)
    with pytest.raises(structure.RefusedError, match=f"{attribute} hides an entry"):
        structure.structure_of(block)
    x = torch.randn(2, 8, 6, 6)
    actual = block(x)
    with use_backend("reference"):
        torch.testing.assert_close(actual, block(x))
