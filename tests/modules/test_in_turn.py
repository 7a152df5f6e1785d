"""Modules alone, and in turn: what is fused, in which layout, and who is taken to look on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from effnet_fast import backends
from effnet_fast.modules import fused_forward, in_turn, layers
from effnet_fast.modules.layers import Conv2dNormActivation, MBConv, MBConvConfig
from effnet_fast.ops.layout import is_nhwc, makes_nhwc, to_nhwc

X = torch.randn(2, 16, 9, 8, generator=torch.Generator().manual_seed(0))


def block() -> MBConv:
    return MBConv(MBConvConfig(6, 3, 1, 16, 16), 0.2, nn.BatchNorm2d)


UNITS: dict[str, tuple[Any, str]] = {
    "block": (block, "mbconv"),
    "depthwise": (
        lambda: Conv2dNormActivation(16, 16, groups=16, activation_layer=nn.SiLU),
        "dwconv_bn_silu",
    ),
    "stem": (lambda: Conv2dNormActivation(16, 24, activation_layer=nn.SiLU), "stem_conv_bn_silu"),
    "pointwise": (lambda: Conv2dNormActivation(16, 24, 1, activation_layer=nn.SiLU), ""),
}
SEEN: dict[str, Any] = {
    "forward hook": lambda m: m.block[0][0].register_forward_hook(lambda *_: None),
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda m: m.block.register_full_backward_hook(lambda *_: None),
    "table": lambda m: setattr(m.block[1][2], "_forward_hooks", {0: lambda *_: None}),
    "patched forward": lambda m: setattr(m.block[2], "forward", m.block[2].forward),
    "own class": lambda m: setattr(m.block[1], "2", type("Own", (nn.SiLU,), {})()),
    "parametrised": lambda m: parametrizations.weight_norm(m.block[0][0]),
}


@pytest.mark.parametrize("mode", ["eval", "no_grad", "train"])
@pytest.mark.parametrize("name", UNITS)
def test_alone_it_is_fused_and_gives_stock_layout(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, op = UNITS[name]
    unit = make().train(mode == "train").requires_grad_(mode != "no_grad")
    used: list[str] = []
    if op:
        run = getattr(fused_forward, op)
        monkeypatch.setattr(fused_forward, op, lambda *a: used.append(op) or run(*a))
    results = []
    for backend in ("cpu", "reference"):
        x = X.clone().requires_grad_(mode != "no_grad")
        with backends.use_backend(backend):
            torch.manual_seed(0)
            y = unit(x)
        results.append([y])
        if mode != "no_grad":
            results[-1].append(torch.autograd.grad(y.square().sum(), x)[0])
    for actual, stock in zip(*results, strict=True):
        assert actual.stride() == stock.stride()
        torch.testing.assert_close(actual, stock, rtol=1e-4, atol=1e-4)
    assert used == ([op] if op else [])


@pytest.mark.parametrize("reason", SEEN)
def test_somebody_sees(reason: str) -> None:
    module = nn.Sequential(block(), block())
    assert not in_turn.sees(module)
    SEEN[reason](module[1])
    assert in_turn.sees(module)


def lay_out(conv: nn.Conv2d) -> None:
    """Gives the weight strides that are channels_last and nothing else."""
    conv.weight.data = conv.weight.detach().clone(memory_format=torch.channels_last)


def test_weights_in_channels_last_are_noticed() -> None:
    module = block()
    assert not makes_nhwc(in_turn.weights_of([module, None]))
    excite = module.block[-2]
    for conv in (excite.fc1, excite.fc2):
        lay_out(conv)
    assert not makes_nhwc(in_turn.weights_of([module]))
    lay_out(module.block[-1][0])
    assert makes_nhwc(in_turn.weights_of([module]))


def test_hidden_no_longer_than_the_call() -> None:
    wrong = layers.Sequential(block(), Conv2dNormActivation(8, 8, 1, activation_layer=nn.SiLU))
    with pytest.raises(RuntimeError, match="channels"):
        wrong(X)
    assert not in_turn.is_hidden()
    assert not is_nhwc(block()(X))


def test_modules_that_give_no_image() -> None:
    class Pairs(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    class First(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return pair[0]

    y = layers.Sequential(block(), Pairs(), First(), nn.Flatten())(X)
    assert y.shape == (2, 16 * 9 * 8)
    y = layers.Sequential(block(), nn.Flatten(), nn.Linear(16 * 9 * 8, 3))(X)
    assert y.shape == (2, 3)


def test_channels_last_goes_through_without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_turn, "sees", None)
    assert is_nhwc(layers.Sequential(block(), block())(to_nhwc(X)))


def test_only_known_packages_are_blind() -> None:
    kinds = {
        nn.Conv2d: True,
        nn.SyncBatchNorm: True,
        MBConv: True,
        layers.Sequential: True,
        type("Own", (nn.Conv2d,), {}): False,
        torch.fx.GraphModule: False,
    }
    for _ in range(2):
        assert {kind: in_turn._is_blind(kind) for kind in kinds} == kinds


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout, nn.RReLU])
def test_what_draws_by_elements_draws_in_stock_layout(kind: Any, training: bool) -> None:
    """Numbers are drawn in the order of memory."""
    modules = nn.Sequential(block(), kind(), block()).train(training)
    results = []
    for run in (in_turn.run, lambda modules, x: (modules(x),)):
        with torch.no_grad():
            torch.manual_seed(0)
            results.append(run(modules, X)[0])
    torch.testing.assert_close(*results)
    assert results[0].stride() == results[1].stride()
