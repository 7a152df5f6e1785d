"""NVIDIA's EfficientNet, accelerated: a stand-in with its names, whose code counts as known."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import linear
from torch.utils.checkpoint import checkpoint

import effnet_fast
import foreign_networks
import nvidia_efficientnet
from effnet_fast.inference.own_plan import plan_of
from effnet_fast.modules import foreign
from effnet_fast.modules.readers.known_code import KNOWN
from foreign_blocks import LAYOUTS, Blocks, blocks, fused_runs
from known_code import learning
from networks import Pair, Trio, random_images

TRT = "SequentialSqueezeAndExcitationTRT"
# What differs from a 3x3 block with expansion, linear squeeze-excite, drop-path and residual.
CASES: dict[str, dict[str, Any]] = {
    "residual": {},
    "without expansion": {"ratio": 1, "kernel": 5},
    "strided": {"stride": 2},
    "wider, for TensorRT": {"cout": 24, "excite": TRT},
    "adds by a function": {"survival": 1.0},
    "another silu": {"act": "ONNXSiLU"},
}
X = torch.randn(2, 16, 8, 9, generator=torch.Generator().manual_seed(0))
TRAINING = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
Edit = Callable[[Any], object]


@pytest.fixture(scope="module", autouse=True)
def models() -> Iterator[Any]:
    """The stand-in's modules, as what the repository has."""
    known, before = dict(KNOWN), sys.modules.copy()
    module, parts = nvidia_efficientnet.stand_in()
    with learning():
        for kind in (module.MBConvBlock, module.EfficientNet):
            foreign.fused_class(kind, "auto", "fast")
    yield module, parts
    KNOWN.clear()
    KNOWN.update(known)
    for name in sys.modules.keys() - before.keys():
        if name.startswith("image_classification"):
            del sys.modules[name]


def two(models: Any, training: bool = False, **changes: Any) -> Blocks:
    module, parts = models
    if "act" in changes:
        changes["act"] = getattr(parts, changes["act"])
    return blocks(lambda: module.MBConvBlock(**changes), training)


@TRAINING
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_parity(models: Any, case: str, layout: str, training: bool) -> None:
    two(models, training, **CASES[case]).assert_fused_parity((16, 9, 8), layout)


CALLS = 48  # of which some drop at every chance of survival that is tested


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("survival", [0.5, 0.9, 0.0])
def test_drops_what_stock_drops(models: Any, survival: float, dtype: torch.dtype) -> None:
    pair = two(models, training=True, survival=survival)
    x, dropped = X.to(dtype), []
    for model in pair.models:
        torch.manual_seed(5)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16)
        with autocast, torch.no_grad(), fused_runs() as runs:
            ys = [model(x) for _ in range(CALLS)]
        assert runs == [True] * (CALLS * (model is pair.actual))
        dropped.append(([torch.equal(y, x) for y in ys], torch.get_rng_state()))
    assert dropped[0][0] == dropped[1][0]
    assert any(dropped[1][0])
    assert torch.equal(dropped[0][1], dropped[1][1])


def _shrink(model: Any) -> None:
    model.se.squeeze.weight = nn.Parameter(model.se.squeeze.weight[:, :-1].clone())


REFUSED: dict[str, tuple[dict[str, Any], Edit, str]] = {
    "quantized": ({}, lambda m: setattr(m, "quantized", True), "quantized is set"),
    "another sum": (
        {"survival": 1.0}, lambda m: setattr(m, "residual_add", torch.sub),
        "residual_add is not torch.add",
    ),
    "mask": ({}, lambda m: m.residual_add.mask.fill_(2), "residual_add.mask is 2.0"),
    "mask in bf16": (
        {}, lambda m: setattr(m.residual_add, "mask", torch.ones((), dtype=torch.bfloat16)),
        "residual_add.mask is no number in float32",
    ),
    "attention": (
        {}, lambda m: setattr(m.se, "_attention", lambda x: x.sigmoid()),
        "se has a patched _attention",
    ),
    "function": (
        {"ratio": 1}, lambda m: m.__dict__.update(expand=torch.tanh), "expand is no module",
    ),
    "hook": (
        {}, lambda m: m.se.squeeze.register_forward_hook(lambda *a: a[-1] * 2),
        "se.squeeze has a hook",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_edits_that_run_as_stock(models: Any, name: str) -> None:
    options, edit, reason = REFUSED[name]
    pair = two(models, True, **options).edited(edit)
    assert pair.refusal == reason
    with fused_runs() as runs:
        pair.assert_alike(X)
    assert runs == []


def test_a_wrong_shape_raises_as_stock(models: Any) -> None:
    pair = two(models).edited(_shrink)
    assert pair.refusal is not None
    errors = []
    for model in pair.models:
        with pytest.raises(RuntimeError) as caught:
            model(X)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_a_replaced_linear_layer_is_called(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = two(models)
    original = linear.Linear.forward
    monkeypatch.setattr(linear.Linear, "forward", lambda *a: original(*a) * 1.5)
    assert pair.refusal == "Linear.forward is replaced"
    pair.assert_alike(X)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_linear_layers_gradient_under_checkpointing(models: Any, reentrant: bool) -> None:
    """The first run, without gradients, reads the weight for the second as well."""
    pair = two(models, training=True, survival=1.0)
    for model in pair.models:
        x = X.clone().requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for ours, theirs in zip(*(m.parameters() for m in pair.models), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)


def trio(models: Any, survival: float = 1.0) -> Trio:
    torch.manual_seed(0)
    stock = models[0].EfficientNet(survival)
    foreign_networks.calibrate(stock)
    actual = effnet_fast.accelerate(copy.deepcopy(stock))
    return Trio(actual, stock, copy.deepcopy(stock).double())


def is_planned(model: nn.Module) -> bool:
    snapshot = plan_of(model).snapshot
    return snapshot is not None and bool(snapshot.engines)


EDITS: dict[str, Edit] = {
    "linear weight": lambda m: m.layers[1][0].se.squeeze.weight.data.mul_(30),
    "linear bias": lambda m: m.layers[1][1].se.expand.bias.data.add_(1),
    "another sum": lambda m: setattr(m.layers[1][1], "residual_add", torch.sub),
    "attention": lambda m: setattr(m.layers[1][0].se, "_attention", lambda x: x.sigmoid()),
    "function": lambda m: m.layers[0][0].__dict__.update(expand=torch.tanh),
    "no residual": lambda m: setattr(m.layers[0][0], "residual", False),
    "flatten": lambda m: setattr(m.classifier, "squeeze", _Flipped()),
}


class _Flipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).flip(1)


@pytest.mark.parametrize("name", EDITS)
def test_a_network_in_one_call_is_never_stale(models: Any, name: str) -> None:
    three, x = trio(models), random_images(2, 64)
    pair = Pair(three.actual, three.stock)
    with torch.no_grad():
        before = pair.assert_alike(x, backward=False)
        assert is_planned(pair.actual)
        pair.apply(EDITS[name])
        after = pair.assert_alike(x, backward=False)
    assert (after["y"] - before["y"]).abs().max() > 1e-2


def test_parity_of_the_network(models: Any) -> None:
    pair, x = trio(models, 0.8), random_images(2, 64)
    with torch.no_grad():
        pair.assert_parity(x, backward=False)
        pair.actual(x)
    assert is_planned(pair.actual)
    pair.train().assert_parity(*(random_images(4, 64, seed=s) for s in range(3)))
    report = effnet_fast.doctor(pair.actual)
    assert [block.reason for block in report.blocks] == [None] * len(report.blocks)


def test_state_copies_and_pickles(models: Any) -> None:
    pair, x = trio(models), random_images(2, 64)
    assert list(pair.actual.state_dict()) == list(pair.stock.state_dict())
    pair.stock.load_state_dict(pair.actual.state_dict(), strict=True)
    buffer = io.BytesIO()
    torch.save(pair.actual, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded) is models[0].EfficientNet
    with torch.no_grad():
        expected: Tensor = pair.actual(x)
        for again in (effnet_fast.accelerate(loaded), copy.deepcopy(pair.actual)):
            assert torch.equal(again(x), expected)
            assert is_planned(again)
