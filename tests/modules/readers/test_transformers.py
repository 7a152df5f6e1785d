"""transformers' EfficientNet blocks and stem, accelerated: their numbers, draws and edits."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effnet_fast
from foreign_blocks import LAYOUTS, Blocks, DropoutAs, blocks, fused_runs

pytest.importorskip("transformers", reason="transformers is no dependency of the tests")
from transformers import EfficientNetConfig, EfficientNetModel
from transformers.activations import GELUActivation, SiLUActivation
from transformers.models.efficientnet import modeling_efficientnet as models

CONFIG = EfficientNetConfig()
# What differs from a 3x3 block with expansion, dropout and residual.
CASES: dict[str, dict[str, Any]] = {
    "residual": {},
    "without expansion": {"expand_ratio": 1, "kernel_size": 5},
    "strided 3, adjusted": {"stride": 2},
    "strided 3": {"stride": 2, "adjust_padding": False},
    "strided 5, adjusted": {"stride": 2, "kernel_size": 5},
    "wider": {"out_dim": 24, "id_skip": True},
}
X = torch.randn(2, 16, 8, 9, generator=torch.Generator().manual_seed(0))
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
TRAINING = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def block(config: EfficientNetConfig = CONFIG, **changes: Any) -> nn.Module:
    options = {
        "in_dim": 16, "out_dim": 16, "stride": 1, "expand_ratio": 4, "kernel_size": 3,
        "drop_rate": 0.3, "id_skip": False, "adjust_padding": True,
    }  # fmt: skip
    return models.EfficientNetBlock(config, **options | changes)


def two(training: bool = False, **changes: Any) -> Blocks:
    return blocks(lambda: block(**changes), training)


def draws_as(dtype: torch.dtype) -> Any:
    def widen(exact: Any) -> None:
        exact.projection.dropout = DropoutAs(exact.projection.dropout.p, dtype).train(
            exact.training
        )

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
@pytest.mark.parametrize("case", ["residual", "strided 5, adjusted"])
def test_parity_in_bf16(case: str, training: bool, layout: str) -> None:
    pair = two(training, **CASES[case])
    pair.assert_fused_parity((16, 9, 8), layout, torch.bfloat16, draws_as(torch.bfloat16))


@LAYOUT
@TRAINING
@pytest.mark.parametrize("size", [(16, 17), (17, 16)], ids=str)
def test_stem_parity(size: tuple[int, int], training: bool, layout: str) -> None:
    pair = blocks(lambda: models.EfficientNetEmbeddings(CONFIG), training)
    pair.assert_fused_parity((3, *size), layout)


def test_a_sum_that_promotes_runs_as_stock() -> None:
    pair = two(training=True)
    with torch.autocast("cpu", torch.bfloat16), fused_runs() as runs:
        y = pair.actual(X)
    assert runs == [False]
    assert y.dtype is torch.float32  # bf16 plus the block's input


@LAYOUT
@pytest.mark.parametrize("weights", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_draws_what_stock_draws(layout: str, weights: str, dtype: torch.dtype) -> None:
    pair = two(training=True, drop_rate=0.5)
    pair.apply(lambda m: m.to(memory_format=LAYOUTS[weights]))
    # Of no image a body is its last norm's bias, which no two ways of rounding take for 0.
    x = torch.zeros(2, 16, 8, 9, dtype=dtype).to(memory_format=LAYOUTS[layout])
    dropped = []
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        for model in pair.models:
            torch.manual_seed(3)
            with torch.no_grad(), fused_runs() as runs:
                dropped.append((model(x) == 0, torch.get_rng_state()))
            assert runs == [True] * (model is pair.actual)
    (ours, state), (theirs, expected) = dropped
    assert torch.equal(ours, theirs)
    assert 0.4 < theirs.float().mean() < 0.6
    assert torch.equal(state, expected)


@pytest.mark.parametrize("momentum", [0.3, None], ids=str)
def test_each_norm_has_its_own_momentum(momentum: float | None) -> None:
    pair = two(training=True)
    norms = [m for m in pair.stock.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [norm.momentum for norm in norms] == [0.1, 0.99, 0.99]
    pair.edited(lambda m: setattr(m.expansion.expand_bn, "momentum", momentum))
    with fused_runs() as runs:
        results = pair.assert_alike(X)
    assert runs == [True]
    assert int(results["buffer expansion.expand_bn.num_batches_tracked"]) == 1


def set_activation(make: Any) -> Any:
    def edit(model: Any) -> None:
        model.expansion.expand_act = make()
        model.depthwise_conv.depthwise_act = make()

    return edit


def pads(*sides: int) -> Any:
    return lambda m: setattr(m.depthwise_conv.depthwise_conv_pad, "padding", sides)


STILL_FUSED = {
    "other padding": pads(1, 2, 0, 1),
    "no padding": pads(0, 0, 0, 0),
    "padding uncalled": lambda m: setattr(m.depthwise_conv, "stride", 1),
    "their silu": set_activation(SiLUActivation),
    "relu6": set_activation(nn.ReLU6),
    "another dropout rate": lambda m: setattr(m.projection.dropout, "p", 0.7),
    "dropout in place": lambda m: setattr(m.projection.dropout, "inplace", True),
    "dropout in eval mode": lambda m: m.projection.dropout.eval(),
    "all dropped": lambda m: setattr(m.projection.dropout, "p", 1),
    "no residual": lambda m: setattr(m.projection, "apply_dropout", False),
}  # fmt: skip


@TRAINING
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", STILL_FUSED)
def test_edits_that_stay_fused(name: str, stride: int, training: bool) -> None:
    pair = two(training, stride=stride).edited(STILL_FUSED[name])
    with fused_runs() as runs:
        pair.assert_alike(X)
    assert runs == [True]


def _circular(model: Any) -> None:
    conv = model.depthwise_conv.depthwise_conv
    conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


def _wrap(path: str) -> Any:
    def edit(model: Any) -> None:
        part = model.get_submodule(path)
        before = part.forward
        part.forward = lambda *a: before(*a) * 1.5

    return edit


NESTED = ("expansion", "depthwise_conv", "squeeze_excite", "projection")
REFUSED: dict[str, Any] = {
    "cropping": pads(-1, 1, 0, 1),
    "padding of ones": lambda m: setattr(m.depthwise_conv.depthwise_conv_pad, "value", 1.0),
    "reflection": lambda m: setattr(
        m.depthwise_conv, "depthwise_conv_pad", nn.ReflectionPad2d((0, 1, 0, 1))
    ),
    "gelu": set_activation(GELUActivation),
    "dropout of channels": lambda m: setattr(m.projection, "dropout", nn.Dropout2d(0.3)),
    "pooled to four": lambda m: setattr(m.squeeze_excite.squeeze, "output_size", (8, 9)),
    "hook": lambda m: m.squeeze_excite.act_expand.register_forward_hook(lambda *a: a[-1] / 2),
    "hook on a part": lambda m: m.depthwise_conv.register_forward_hook(lambda *a: a[-1] / 2),
    "an attribute in front": lambda m: m.expansion.__dict__.update(expand_act=nn.ReLU()),
    "a part in front": lambda m: m.__dict__.update(squeeze_excite=nn.Identity()),
    "a child more": lambda m: m.projection.add_module("more", nn.Identity()),
    "circular": _circular,
    **{f"forward of {path}": _wrap(path) for path in NESTED},
}


@TRAINING
@pytest.mark.parametrize("name", REFUSED)
def test_edits_that_run_as_stock(name: str, training: bool) -> None:
    is_padding = name in ("cropping", "padding of ones", "reflection")
    pair = two(training, stride=2 if is_padding else 1).edited(REFUSED[name])
    assert pair.refusal is not None
    with fused_runs() as runs:
        pair.assert_alike(X)
    assert runs == []


def test_errors_are_stocks() -> None:
    for edit in (
        lambda m: setattr(m.projection.dropout, "p", 1.5),
        lambda m: setattr(m.depthwise_conv.depthwise_conv, "stride", (2, 2)),
        lambda m: setattr(m, "expand_ratio", 1),
        lambda m: delattr(m.squeeze_excite, "reduce"),
    ):
        pair = two().edited(edit)
        errors = []
        for model in pair.models:
            with pytest.raises((AttributeError, RuntimeError, ValueError)) as caught:
                model(X)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]


@pytest.mark.parametrize("stride", [1, 2])
def test_images_smaller_than_the_kernel(stride: int) -> None:
    pair = two(stride=stride, id_skip=True)
    x = X[:, :, :1, :1]
    if stride == 1:
        pair.assert_alike(x)
        return
    for model in pair.models:
        with pytest.raises(RuntimeError, match="size can't be greater than"):
            model(x)


# Of what has a forward that a class may get another one for, and whose turn it is in a block.
REPLACED: dict[str, tuple[Any, str]] = {
    **{
        f"{kind}.forward": (getattr(models, kind), "forward")
        for kind in (
            "EfficientNetExpansionLayer", "EfficientNetDepthwiseLayer",
            "EfficientNetSqueezeExciteLayer", "EfficientNetFinalBlockLayer",
            "EfficientNetDepthwiseConv2d",
        )
    },
    "_conv_forward": (models.EfficientNetDepthwiseConv2d, "_conv_forward"),
    "Conv2d._conv_forward": (nn.Conv2d, "_conv_forward"),
    "ZeroPad2d.forward": (nn.ZeroPad2d, "forward"),
    "Dropout.forward": (nn.Dropout, "forward"),
    "F.dropout": (F, "dropout"),
    "F.pad": (F, "pad"),
    "SiLUActivation.forward": (SiLUActivation, "forward"),
}  # fmt: skip


@pytest.mark.parametrize("name", REPLACED)
def test_code_that_is_replaced_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute = REPLACED[name]
    config = EfficientNetConfig(hidden_act="silu" if owner is SiLUActivation else "swish")
    stride = 2 if "ad" in name.partition(".")[2] or owner is nn.ZeroPad2d else 1
    pair = two(training=True, config=config, stride=stride)
    pair.assert_alike(X)
    assert pair.refusal is None
    original = getattr(owner, attribute)
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, lambda *a, **k: original(*a, **k) * 1.5)
        assert str(pair.refusal).endswith("is replaced")
        with fused_runs() as runs:
            pair.assert_alike(X)
        assert runs == []
    assert pair.refusal is None
    pair.assert_alike(X)


def network() -> Any:
    torch.manual_seed(0)
    config = EfficientNetConfig(
        image_size=32, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320
    )
    return EfficientNetModel(config)


def test_a_whole_model() -> None:
    stock = network()
    actual = effnet_fast.accelerate(copy.deepcopy(stock))
    x: Tensor = torch.randn(2, 3, 33, 32)
    count = len(stock.encoder.blocks) + 1
    for training in (False, True):
        results = []
        for model in (actual.train(training), stock.train(training)):
            torch.manual_seed(0)
            with fused_runs() as runs:
                results.append(model(pixel_values=x).last_hidden_state)
            # The last convolution has no op for gradients.
            assert runs == ([True] * count + [False]) * (model is actual)
        torch.testing.assert_close(*results)
    copied = copy.deepcopy(actual)
    assert [type(m) for m in copied.modules()] == [type(m) for m in actual.modules()]
    loaded = pickle.loads(pickle.dumps(actual))
    assert [type(m) for m in loaded.modules()] == [type(m) for m in stock.modules()]
    effnet_fast.restore(actual)
    assert [type(m) for m in actual.modules()] == [type(m) for m in stock.modules()]


def test_arguments_have_their_names() -> None:
    model = effnet_fast.accelerate(network().eval())
    with fused_runs() as runs:
        y = model.embeddings(pixel_values=torch.randn(1, 3, 32, 32))
        model.encoder.blocks[0](hidden_states=y)
    assert runs == [True, True]
