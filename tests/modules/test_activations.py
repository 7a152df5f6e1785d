"""Blocks and networks with other activations and gates, and without squeeze-excite, as modules."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

import effnet_fast
import surgery
from effnet_fast import use_backend
from effnet_fast.backends import cpu
from effnet_fast.inference.cpu_engine import CpuEngine
from effnet_fast.models import EfficientNet
from effnet_fast.modules import fused_forward, structure
from effnet_fast.modules.explain import explain
from effnet_fast.modules.layers import (
    Conv2dNormActivation,
    MBConv,
    MBConvConfig,
    SqueezeExcitation,
)
from networks import MINI, assert_alike, calibrated_state, random_images, run_network

KINDS = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.Identity: "identity"}
ANY_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
SQUEEZE = pytest.mark.parametrize("squeeze", [True, False], ids=["squeeze", "plain"])
TRAINING = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
X = random_images(2, 32)


def block(expand: int = 6, kind: type[nn.Module] = nn.ReLU6, squeeze: bool = True) -> MBConv:
    torch.manual_seed(0)
    module = MBConv(MBConvConfig(expand, 3, 1, 8, 8), 0.0, nn.BatchNorm2d)
    for norm in [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]:
        nn.init.uniform_(norm.weight, 0.5, 4.0)
        nn.init.normal_(norm.bias)
    surgery.set_activations(module, kind, squeeze)
    return module


def network(kind: Any = nn.ReLU6, squeeze: bool = True) -> EfficientNet:
    model = EfficientNet(MINI)
    model.load_state_dict(calibrated_state(MINI))
    surgery.set_activations(model, kind, squeeze)
    return model.eval()


@ANY_KIND
@SQUEEZE
def test_a_block_is_read(kind: type[nn.Module], squeeze: bool) -> None:
    for expand in (1, 6):
        found = structure.structure_of(block(expand, kind, squeeze))
        assert isinstance(found, structure.Block)
        layers = (found.depthwise, found.expand or found.depthwise)
        assert {found.activation, *(layer.activation for layer in layers)} == {KINDS[kind]}
        assert not found.project.activates
        assert (found.expand is None) == (expand == 1)
        assert (found.excite is None) != squeeze
        given = 5 * (2 + (expand != 1)) + 4 * squeeze
        assert len(found.parameters) == given
        if squeeze:
            assert (found.se_activation, found.gate) == (KINDS[kind], "sigmoid")


@TRAINING
@SQUEEZE
@ANY_KIND
def test_a_block_is_fused(
    kind: type[nn.Module], squeeze: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    original = fused_forward._run_block
    monkeypatch.setattr(fused_forward, "_run_block", lambda *args: ran.append(1) or original(*args))
    for count, expand in enumerate((1, 6), start=1):
        module = block(expand, kind, squeeze).train(training)
        stock, x = copy.deepcopy(module), torch.randn(4, 8, 6, 6)
        assert explain(module) is None
        actual = run_network(module, x)
        assert len(ran) == count
        with use_backend("reference"):
            assert_alike(actual, run_network(stock, x))


@pytest.mark.parametrize("gate", [nn.Sigmoid, nn.Hardsigmoid], ids=lambda kind: kind.__name__)
def test_gates(gate: type[nn.Module]) -> None:
    module = block(kind=nn.ReLU)
    surgery.set_activations(module, gate)
    found = structure.structure_of(module)
    assert isinstance(found, structure.Block)
    assert found.gate == gate.__name__.lower()
    stock, x = copy.deepcopy(module), torch.randn(4, 8, 6, 6)
    actual = run_network(module, x)
    with use_backend("reference"):
        assert_alike(actual, run_network(stock, x))


REFUSED: dict[str, tuple[Any, str]] = {
    "unknown": (lambda b: surgery.set_item(b.block[1], 2, nn.GELU()), r"\.1\.2 is GELU, not SiLU"),
    "subclass": (
        lambda b: surgery.set_item(b.block[0], 2, type("Own", (nn.ReLU6,), {})()),
        r"\.0\.2 is Own, not SiLU",
    ),
    "bounds": (
        lambda b: surgery.set_item(b.block[0], 2, surgery.relu6_up_to(4.0)),
        r"block\.0\.2 clamps to 0\.0 and 4\.0, not to 0 and 6",
    ),
    "se_bounds": (
        lambda b: setattr(b.block[2], "activation", surgery.relu6_up_to(4.0)),
        r"block\.2\.activation clamps to 0\.0 and 4\.0",
    ),
    "two": (
        lambda b: surgery.set_item(b.block[1], 2, nn.ReLU()),
        "block.0 and block.1 have different activations, relu6 and relu",
    ),
    "one": (lambda b: b.block[0].pop(2), "different activations, identity and relu6"),
    "gate": (lambda b: setattr(b.block[2], "scale_activation", nn.ReLU6()), "not Sigmoid"),
    "projected": (
        lambda b: b.block[3].append(nn.ReLU6()),
        "block is not expand, depthwise, squeeze-excite, project",
    ),
    "twice": (lambda b: surgery.set_item(b.block, 2, copy.deepcopy(b.block[1])), r"\.2 is Conv2dN"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_runs_as_stock(name: str) -> None:
    change, words = REFUSED[name]
    module = block().eval()
    change(module)
    with pytest.raises(structure.RefusedError, match=words):
        structure.structure_of(module)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        y = module(x)
        with use_backend("reference"):
            torch.testing.assert_close(y, module(x))


def test_a_body_of_three_layers_has_either_in_its_middle() -> None:
    """[depthwise, squeeze-excite, project] and [expand, depthwise, project]."""
    with_excite, plain = block(1), block(6, squeeze=False)
    assert len(with_excite.block) == len(plain.block) == 3
    assert isinstance(with_excite.block[1], SqueezeExcitation)
    for module, has_excite in ((with_excite, True), (plain, False)):
        found = structure.structure_of(module)
        assert isinstance(found, structure.Block)
        assert (found.excite is not None, found.expand is None) == (has_excite, has_excite)
    plain.block[1] = plain.block[0]
    with pytest.raises(structure.RefusedError):
        structure.structure_of(plain)


@TRAINING
@ANY_KIND
def test_layers(kind: type[nn.Module], training: bool) -> None:
    """A stem, a depthwise and a 1x1 layer by themselves."""
    for kernel, groups in ((3, 1), (3, 8), (1, 1)):
        torch.manual_seed(0)
        layer = Conv2dNormActivation(8, 8, kernel, groups=groups, activation_layer=kind)
        nn.init.uniform_(layer[1].weight, 0.5, 4.0)
        layer.train(training)
        found, stock = structure.structure_of(layer), copy.deepcopy(layer)
        assert isinstance(found, structure.Layer)
        assert found.activation == KINDS[kind]
        x = torch.randn(4, 8, 6, 6)
        actual = run_network(layer, x)
        with use_backend("reference"):
            assert_alike(actual, run_network(stock, x))


@SQUEEZE
@ANY_KIND
def test_a_network_runs_in_one_call(
    kind: type[nn.Module], squeeze: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    original = CpuEngine.__call__
    monkeypatch.setattr(CpuEngine, "__call__", lambda *args: runs.append(1) or original(*args))
    model = network(kind, squeeze)
    if kind is nn.Identity:  # without activations in the stem and the head it runs block by block
        for layer in (model.features[0], model.features[-1]):
            layer[2] = nn.ReLU()
    with torch.no_grad():
        y = model(X)
        assert len(runs) == 1
        with use_backend("reference"):
            expected = model(X)
        assert_alike({"y": y}, {"y": expected})
        deployed = effnet_fast.deploy(model)
        assert_alike({"y": deployed(X)}, {"y": expected})


def test_a_bound_that_changes_later_is_noticed() -> None:
    model = network()
    with torch.no_grad():
        before = model(X)
        for index, module in enumerate(m for m in model.modules() if type(m) is nn.ReLU6):
            module.max_val = 0.5 + index % 2
        y = model(X)
        with use_backend("reference"):
            expected = model(X)
    assert_alike({"y": y}, {"y": expected})
    assert not torch.allclose(y, before, rtol=1e-3)


@TRAINING
def test_a_network_block_by_block(training: bool) -> None:
    for kind, squeeze in itertools.product((nn.ReLU6, nn.Hardswish), (True, False)):
        model = network(kind, squeeze).train(training)
        stock = copy.deepcopy(model)
        actual = run_network(model, X)
        with use_backend("reference"):
            assert_alike(actual, run_network(stock, X))


def test_a_backend_that_lacks_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the table alone: the block runs as stock, and the report says why."""
    module = block(kind=nn.Hardswish)
    monkeypatch.setattr(cpu.CPU, "activations", ("silu", "relu"))
    assert explain(module) == "the activation is hardswish; the cpu backend has silu and relu"
    assert effnet_fast.doctor(nn.Sequential(module)).blocks[0].reason == explain(module)
    monkeypatch.undo()
    monkeypatch.setattr(cpu.CPU, "gates", ("sigmoid", "hardsigmoid"))
    plain = block(squeeze=False)
    assert explain(module) is None
    assert explain(plain) == "the cpu backend has no kernel for blocks without squeeze-excite"
    with use_backend("cpu"), pytest.raises(RuntimeError, match="no kernel for blocks without sq"):
        plain(torch.randn(2, 8, 6, 6))
