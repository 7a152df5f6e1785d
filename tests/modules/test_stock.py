"""Code that is replaced below a module is run, wherever stock's forward would meet it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effnet_fast
from edit_kinds import CLASSES, FUNCTIONS
from effnet_fast import use_backend
from effnet_fast.inference.cpu_engine import CpuEngine
from effnet_fast.models import EfficientNet, EfficientNetFeatures
from effnet_fast.modules import (
    fused_forward,
    layers,
    same_padding,
    stochastic_depth,
    stock,
    structure,
)
from effnet_fast.modules.explain import explain
from networks import MINI, assert_alike, run_network
from replacing import X, count, network, replace_method

TARGETS = [*CLASSES, *FUNCTIONS]


def name_of(target: tuple[Any, str]) -> str:
    return f"{getattr(target[0], '__qualname__', target[0].__name__)}.{target[1]}"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_it_is_called_as_often_as_by_stock(
    target: tuple[Any, str], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a network that has run before: in one call in eval, block by block in training."""
    model = network(padding="same").train(training)
    with torch.set_grad_enabled(training):
        model(X)
        with monkeypatch.context() as patch:
            calls = replace_method(patch, *target)
            ours = count(model, X, calls)
            with use_backend("reference"):
                stocks = count(model, X, calls)
            assert ours == stocks
        assert ours or name_of(target) in UNMET


UNMET = {  # stock's forward calls them in training alone, or not at all
    "EfficientNet.__call__",
    "torch._C._nn.silu",  # networks' own SiLUs are in place
    *("torch.mm", "torch.bmm"),  # fused ops alone use them: they must not, once replaced
}


@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_the_plan_returns_when_it_is_put_back(
    target: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, runs = network(), []
    original = CpuEngine.__call__
    monkeypatch.setattr(CpuEngine, "__call__", lambda *args: runs.append(1) or original(*args))
    with torch.no_grad():
        before = model(X)
        with monkeypatch.context() as patch:
            replace_method(patch, *target)
            assert_alike({"y": model(X)}, {"y": before})
        assert torch.equal(model(X), before)
    inside = target in [(EfficientNet, "forward"), (EfficientNet, "__call__")]
    assert len(runs) >= 2 + inside


def test_a_wrapper_around_a_blocks_forward_keeps_its_fusion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is called for each block below the network, and the block inside is fused."""
    ran = []
    original = fused_forward._run_block
    monkeypatch.setattr(fused_forward, "_run_block", lambda *args: ran.append(1) or original(*args))
    model = network()
    calls = replace_method(monkeypatch, layers.MBConv, "forward")
    with torch.no_grad():
        assert count(model, X, calls) == len(ran) == model.variant.blocks


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ((F, "conv2d"), "torch.nn.functional.conv2d is replaced"),
        ((nn.Conv2d, "_conv_forward"), "Conv2d._conv_forward is replaced"),
        ((nn.SiLU, "__call__"), "SiLU.__call__ is replaced"),
        ((EfficientNet, "forward_head"), "EfficientNet.forward_head is replaced"),
        ((EfficientNet, "forward"), "EfficientNet.forward is replaced"),
    ],
    ids=lambda value: name_of(value) if isinstance(value, tuple) else "",
)
def test_deploy_refuses_it_by_name(
    target: tuple[Any, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    deployed = effnet_fast.deploy(model)
    y = deployed(X)
    with monkeypatch.context() as patch:
        replace_method(patch, *target)
        for call in (lambda: deployed(X), lambda: effnet_fast.deploy(model)):
            with pytest.raises(RuntimeError, match=words):
                call()
    assert torch.equal(deployed(X), y)


def test_an_encoder_heeds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = EfficientNetFeatures(MINI).eval()
    with torch.no_grad():
        model(X)
        calls = replace_method(monkeypatch, nn.BatchNorm2d, "forward")
        assert count(model, X, calls) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_a_deleted_attribute_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._nn, "silu")
    assert stock.LAYER.replaced() == "torch._C._nn.silu is replaced"
    monkeypatch.undo()
    assert stock.LAYER.replaced() is None


def test_explain_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    block = network().features[2][0]
    assert explain(block) is None
    replace_method(monkeypatch, F, "batch_norm")
    assert explain(block) == "torch.nn.functional.batch_norm is replaced"


INSTANCE: dict[str, Callable[[Any], nn.Module]] = {
    "forward": lambda m: m.features[2][0].block[0],
    "_conv_forward": lambda m: m.features[2][0].block[1][0],
    "_check_input_dim": lambda m: m.features[0][1],
    "gate": lambda m: m.features[2][0].block[2],
    "forward_stock": lambda m: m.features[2][0],
    "_call_impl": lambda m: m.features[8][2] if len(m.features) > 8 else m.features[-1][2],
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", INSTANCE)
def test_an_instances_own_method_is_called(name: str, training: bool) -> None:
    model, calls = network().train(training), []
    deployed = None if training else effnet_fast.deploy(model)
    with torch.set_grad_enabled(training):
        model(X)
        module = INSTANCE[name](model)
        original = getattr(module, name)
        setattr(module, name, lambda *args: calls.append(1) or original(*args))
        assert count(model, X, calls) == 1
        if deployed is not None:
            with pytest.raises(RuntimeError, match=f"has a patched {name}"):
                deployed(X)
        delattr(module, name)
        assert count(model, X, calls) == 0


def test_an_instances_own_methods_are_all_in_the_table() -> None:
    # `_scale` is a method of torchvision's squeeze-and-excitation alone.
    assert set(INSTANCE) == structure.METHODS - {"_compiled_call_impl", "_scale"}
    plain = nn.SiLU().__dict__
    assert not structure.is_altered(plain)
    assert all(structure.is_altered({**plain, name: None}) for name in structure.METHODS)


def test_a_compiled_child_runs_compiled() -> None:
    """What `Module.compile` sets; None there is how it is undone."""
    model, calls = network(), []
    with torch.no_grad():
        model(X)
        conv = model.features[2][0].block[0][0]
        conv._compiled_call_impl = lambda x: calls.append(1) or conv._call_impl(x)
        assert count(model, X, calls) == 1
        assert "a patched _compiled_call_impl" in explain(model.features[2][0])
        conv._compiled_call_impl = None
        assert count(model, X, calls) == 0
        assert explain(model.features[2][0]) is None
        assert effnet_fast.deploy(model)(X).shape == (2, 1000)


WRAPPED = """
import functools
original = {0}
@functools.wraps(original)
def wrapper(*args, **kwargs):
    return original(*args, **kwargs)
{0} = wrapper
"""
# PyTorch is imported once, then each change has a process of its own.
BEFORE_THE_IMPORT = """
import os, sys, torch
for change in sys.argv[1:]:
    if os.fork() == 0:
        exec(change)
        from effnet_fast.modules import stock
        print(stock.NETWORK.replaced(), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def replaced_before_the_import(changes: list[str]) -> list[str]:
    """The reason that each of these changes alone is for no network to be recognised."""
    command = [sys.executable, "-c", BEFORE_THE_IMPORT, *changes]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.slow
def test_what_was_replaced_before_the_import_counts() -> None:
    names = ("functional.conv2d", "functional.silu", "Linear.forward", "Conv2d.__call__")
    changes = [WRAPPED.format(f"torch.nn.{name}") for name in (*names, "Linear.reset_parameters")]
    assert replaced_before_the_import(changes) == [
        "torch.nn.functional.conv2d is replaced",
        "torch.nn.functional.silu is replaced",
        "Linear.forward is replaced",
        "Conv2d.__call__ is replaced",
        "None",
    ]


@pytest.mark.slow
def test_another_function_of_torch_in_its_place_counts() -> None:
    changes = [
        "torch.nn.functional.silu = torch.nn.functional.hardswish",
        "torch.nn.functional.conv2d = torch.relu",
        "torch.nn.SiLU.forward = torch.nn.Hardswish.forward",
    ]
    reasons = replaced_before_the_import(changes)
    assert len(reasons) == len(changes)
    assert all(reason.endswith("is replaced") for reason in reasons)


def test_training_gives_what_a_replacement_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients, and by a function that changes the values."""
    monkeypatch.setattr(F, "silu", lambda x, inplace=False: x * torch.sigmoid(2 * x))
    model = network().train()
    ours = run_network(model, X)
    other = network().train()
    with use_backend("reference"):
        assert_alike(ours, run_network(other, X))


def test_a_gradient_is_stocks_where_ours_would_use_a_replacement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Backward of the stem multiplies in Python."""
    original = Tensor.__mul__
    monkeypatch.setattr(Tensor, "__mul__", lambda a, b: original(a, b).neg())
    ours = run_network(network(), X)
    with use_backend("reference"):
        assert_alike(ours, run_network(network(), X))


def test_the_functions_that_ours_call_are_in_the_table() -> None:
    found = set(stock.NETWORK.originals)
    assert (same_padding, "same_padding") in found
    assert (stochastic_depth, "stochastic_depth") in found


def double(module: nn.Module, name: str) -> Any:
    """A property in place of a parameter, buffer or child, which stock would meet."""
    if isinstance(getattr(module, name), nn.Module):
        return property(lambda m: lambda x: m._modules[name](x) * 2)
    return property(lambda m: (m._parameters if name in m._parameters else m._buffers)[name] * 2)


def conv_of(model: nn.Module) -> nn.Module:
    return model.features[2][0].block[1][0]


def norm_of(model: nn.Module) -> nn.Module:
    return model.features[2][0].block[1][1]


# A class, a name that its instances have, and how to find one.
HIDING: tuple[tuple[type, str, Callable[[nn.Module], nn.Module]], ...] = (
    (nn.Conv2d, "weight", conv_of),
    (nn.modules.conv._ConvNd, "weight", conv_of),
    (nn.BatchNorm2d, "weight", norm_of),
    (nn.modules.batchnorm._NormBase, "running_var", norm_of),
    (layers.SqueezeExcitation, "fc1", lambda m: m.features[2][0].block[2]),
    (nn.Linear, "weight", lambda m: m.classifier[1]),
)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("kind", "name", "find"), HIDING, ids=lambda v: getattr(v, "__name__", v))
def test_a_property_of_a_class(
    kind: type,
    name: str,
    find: Callable[[nn.Module], nn.Module],
    training: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    for backend in ("auto", "reference"):
        model = network().train(training)
        with use_backend(backend), torch.set_grad_enabled(training), monkeypatch.context() as patch:
            torch.manual_seed(0)
            before = model(X)
            patch.setattr(kind, name, double(find(model), name), raising=False)
            torch.manual_seed(0)
            results.append({"y": model(X).detach()})
            if not (training and name == "running_var"):
                assert not torch.allclose(results[-1]["y"], before, rtol=1e-3)
    assert_alike(*results)


def test_other_attributes_of_a_class_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Conv2d, "own_attribute", 1, raising=False)
    assert stock.NETWORK.replaced() is None
    assert stock.NETWORK._holds()
    monkeypatch.setattr(nn.Conv2d, "bias", None, raising=False)
    assert stock.LAYER.replaced() == "Conv2d.bias hides what its instances have"
    monkeypatch.undo()
    assert stock.NETWORK.replaced() is None


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_replaced_code_of_a_function(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reloaders do: the function stays."""
    model, calls = network().train(training), []
    monkeypatch.setitem(nn.SiLU.forward.__globals__, "noted", calls)
    with torch.set_grad_enabled(training):
        model(X)
        code = eval("lambda self, input: (noted.append(self), input.clamp(-1, 1))[1]").__code__
        monkeypatch.setattr(nn.SiLU.forward, "__code__", code)
        model(X)
    silus = [m for m in model.modules() if type(m) is nn.SiLU]
    assert len(calls) == len(silus)
    assert stock.LAYER.replaced() == "the code of SiLU.forward is replaced"


@pytest.mark.parametrize("name", ["conv", "batchnorm", "activation", "pooling", "linear"])
def test_another_module_in_place_of_the_functions(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    class Noting:
        def __getattr__(self, function: str) -> Any:
            calls.append(function)
            return getattr(F, function)

    model = network()
    with torch.no_grad():
        model(X)
        monkeypatch.setattr(getattr(nn.modules, name), "F", Noting())
        count(model, X, calls)
        ours = [*calls]
        with use_backend("reference"):
            count(model, X, calls)
    assert ours == calls
    assert calls
