"""MONAI's EfficientNet blocks, accelerated: their numbers, draws and edits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effnet_fast
from foreign_blocks import LAYOUTS, Blocks, blocks, fused_runs

pytest.importorskip("monai", reason="MONAI is no dependency of the tests")
from monai.networks.blocks import activation
from monai.networks.nets import efficientnet as models

# What differs from a 3x3 block with expansion, squeeze-excite and residual.
CASES: dict[str, dict[str, Any]] = {
    "residual": {},
    "without expansion": {"expand_ratio": 1, "kernel_size": 5},
    "strided, even": {"stride": 2},
    "strided, odd": {"stride": 2, "image_size": [9, 9]},
    "strided 5, mixed": {"stride": 2, "kernel_size": 5, "image_size": [9, 8]},
    "wider, without squeeze-excite": {"out_channels": 24, "se_ratio": None},
}
X = torch.randn(6, 16, 8, 9, generator=torch.Generator().manual_seed(0))
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
TRAINING = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def block(**changes: Any) -> nn.Module:
    options = {
        "spatial_dims": 2, "in_channels": 16, "out_channels": 16, "kernel_size": 3, "stride": 1,
        "image_size": [8, 8], "expand_ratio": 4, "se_ratio": 0.25, "drop_connect_rate": 0.4,
    }  # fmt: skip
    return models.MBConvBlock(**options | changes)


def two(training: bool = False, **changes: Any) -> Blocks:
    return blocks(lambda: block(**changes), training)


def draws_as(dtype: torch.dtype) -> Any:
    """Makes a block in float64 drop the rows that it would drop in this dtype."""

    def widen(exact: Any) -> None:
        keep = 1 - exact.drop_connect_rate
        exact.drop_connect_rate = None
        adds = exact.stride == 1 and exact.in_channels == exact.out_channels

        def drop(_module: nn.Module, _args: object, y: Tensor) -> Tensor:
            if not (exact.training and adds):
                return y
            drawn = torch.rand([y.shape[0], 1, 1, 1], dtype=dtype)
            return y / keep * (drawn + keep).floor()

        exact._bn2.register_forward_hook(drop)

    return widen


@LAYOUT
@TRAINING
@pytest.mark.parametrize("side", [8, 9], ids=["even", "odd"])
@pytest.mark.parametrize("case", CASES)
def test_parity(case: str, side: int, training: bool, layout: str) -> None:
    pair = two(training, **CASES[case])
    pair.assert_fused_parity((16, side, side), layout, widen=draws_as(torch.float32))


@LAYOUT
@TRAINING
@pytest.mark.parametrize("case", ["residual", "strided 5, mixed"])
def test_parity_in_bf16(case: str, training: bool, layout: str) -> None:
    pair = two(training, **CASES[case])
    pair.assert_fused_parity((16, 9, 8), layout, torch.bfloat16, draws_as(torch.bfloat16))


@TRAINING
@pytest.mark.parametrize("lean", [True, False], ids=["memory efficient", "plain"])
def test_both_kinds_of_swish(lean: bool, training: bool) -> None:
    pair = two(training).edited(lambda m: m.set_swish(lean))
    assert type(pair.actual._swish) is not nn.SiLU
    pair.assert_fused_parity((16, 9, 8), "contiguous", widen=draws_as(torch.float32))


@pytest.mark.parametrize("rate", [0.4, 0.9, 0, None])
def test_drops_what_stock_drops(rate: float | None) -> None:
    pair = two(training=True, drop_connect_rate=rate)
    dropped = []
    for model in pair.models:
        torch.manual_seed(3)
        with torch.no_grad():
            y = model(X)
        dropped.append(((y == X).flatten(1).all(1).tolist(), torch.get_rng_state()))
    assert dropped[0][0] == dropped[1][0]
    assert any(dropped[0][0]) == bool(rate)
    assert torch.equal(dropped[0][1], dropped[1][1])


def swish(make: Any) -> Any:
    return lambda m: setattr(m, "_swish", make())


STILL_FUSED = {
    "other padding": lambda m: setattr(m._depthwise_conv_padding, "padding", (1, 2, 0, 1)),
    "padding for an identity": lambda m: setattr(
        m, "_project_conv_padding", nn.ConstantPad2d(0, 0.0)
    ),
    "silu": swish(nn.SiLU),
    "relu6": swish(nn.ReLU6),
    "no residual": lambda m: setattr(m, "id_skip", False),
    "momentum": lambda m: setattr(m._bn0, "momentum", 0.3),
}


@TRAINING
@pytest.mark.parametrize("name", STILL_FUSED)
def test_edits_that_stay_fused(name: str, training: bool) -> None:
    strided = name.startswith("other")
    pair = two(training, stride=2 if strided else 1).edited(STILL_FUSED[name])
    with fused_runs() as runs:
        pair.assert_alike(X)
    assert runs == [True]


def learned_swish() -> nn.Module:
    made: Any = activation.Swish()
    del made.alpha
    made.alpha = nn.Parameter(torch.tensor(1.0))
    return made


def _wrap(model: Any) -> None:
    before = model._se_expand_padding.forward
    model._se_expand_padding.forward = lambda x: before(x) * 1.5


REFUSED: dict[str, Any] = {
    "a steeper swish": swish(lambda: activation.Swish(1.5)),
    "a learned swish": swish(learned_swish),
    "mish": swish(activation.Mish),
    "padding of ones": lambda m: setattr(m._depthwise_conv_padding, "value", 1.0),
    "reflection": lambda m: setattr(m, "_depthwise_conv_padding", nn.ReflectionPad2d(1)),
    "padding before the projection": lambda m: setattr(
        m, "_project_conv_padding", nn.ReflectionPad2d((0, 0, 0, 0))
    ),
    "hook": lambda m: m._swish.register_forward_hook(lambda *a: a[-1] / 2),
    "patched forward": _wrap,
    "an attribute in front": lambda m: m.__dict__.update(_swish=nn.ReLU()),
    "a child more": lambda m: m.add_module("more", nn.Identity()),
    "no squeeze-excite": lambda m: setattr(m, "has_se", False),
    "another norm": lambda m: setattr(m, "_bn1", nn.InstanceNorm2d(64)),
}


@TRAINING
@pytest.mark.parametrize("name", REFUSED)
def test_edits_that_run_as_stock(name: str, training: bool) -> None:
    pair = two(training).edited(REFUSED[name])
    assert pair.refusal is not None
    with fused_runs() as runs:
        pair.assert_alike(X)
    assert runs == []


def test_errors_are_stocks() -> None:
    for edit in (
        lambda m: setattr(m, "drop_connect_rate", 1.5),
        lambda m: setattr(m, "expand_ratio", 1),
        lambda m: delattr(m, "_se_reduce"),
    ):
        pair = two().edited(edit)
        errors = []
        for model in pair.models:
            with pytest.raises((AttributeError, RuntimeError, ValueError)) as caught:
                model(X)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]


def test_all_dropped() -> None:
    pair = two(training=True).edited(lambda m: setattr(m, "drop_connect_rate", 1.0))
    ours, theirs = (model(X) for model in pair.models)
    assert pair.refusal is not None  # it divides by 0
    assert torch.equal(ours.isnan(), theirs.isnan())


# Code below a block, and what is called of its owner.
REPLACED = {
    "drop_connect": (models, "drop_connect"),
    "MemoryEfficientSwish.forward": (activation.MemoryEfficientSwish, "forward"),
    "monai_swish": (activation, "monai_swish"),
    "ConstantPad2d.forward": (nn.ConstantPad2d, "forward"),
    "Identity.forward": (nn.Identity, "forward"),
    "torch.sigmoid": (torch, "sigmoid"),
    "torch.rand": (torch, "rand"),
    "silu": (nn.functional, "silu"),
}


@pytest.mark.parametrize("name", REPLACED)
def test_code_that_is_replaced_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = two(training=True)
    pair.assert_alike(X)
    assert pair.refusal is None
    owner, attribute = REPLACED[name]
    original = getattr(owner, attribute)
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, lambda *a, **k: original(*a, **k) * 1.5)
        assert str(pair.refusal).endswith("is replaced")
        with fused_runs() as runs:
            pair.assert_alike(X)
        assert runs == []
    assert pair.refusal is None
    pair.assert_alike(X)


def test_three_dimensions_run_as_stock() -> None:
    pair = two(spatial_dims=3, image_size=[8, 8, 8])
    assert pair.refusal is not None
    x = torch.randn(1, 16, 4, 5, 6)
    assert torch.equal(pair.actual(x), pair.stock(x))


def test_a_whole_network() -> None:
    stock = models.EfficientNetBN("efficientnet-b0", pretrained=False, num_classes=5)
    actual = effnet_fast.accelerate(copy.deepcopy(stock))
    x = torch.randn(2, 3, 64, 64)
    for training in (False, True):
        results = []
        for model in (actual.train(training), stock.train(training)):
            torch.manual_seed(0)
            with fused_runs() as runs, torch.no_grad():
                results.append(model(x))
            # The stem and 16 blocks; in eval mode the network runs in one call.
            assert runs == [True] * (17 * (model is actual and training))
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_the_argument_has_its_name() -> None:
    pair = two()
    torch.testing.assert_close(pair.actual(inputs=X), pair.stock(inputs=X))


def test_torchscript() -> None:
    pair = two()
    scripted = torch.jit.script(pair.actual)
    torch.testing.assert_close(scripted(X), pair.stock(X))
