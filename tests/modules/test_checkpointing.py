"""Gradient checkpointing: the same step as without, once."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils import checkpoint

from effnet_fast import backends
from effnet_fast.models import EfficientNet, EfficientNetFeatures
from effnet_fast.modules import fused_forward
from effnet_fast.modules.layers import MBConv
from networks import TINY, assert_alike, pair, random_images, run_network

X = random_images(4, 48)


def with_and_without(prepare: Callable[[nn.Module], object] = lambda _: None) -> list[nn.Module]:
    """The same network twice in training, the first with checkpointing."""
    models = [pair().train().actual for _ in range(2)]
    models[0].set_grad_checkpointing()
    for model in models:
        prepare(model)
    return models


def assert_same_step(models: list[nn.Module], x: Tensor = X) -> None:
    """Outputs, gradients and buffers are bitwise equal, and the generators stand alike."""
    results = []
    for model in models:
        results.append(run_network(model, x))
        torch.manual_seed(0)
        model(x).sum().backward()
        results[-1]["after"] = torch.rand(3)
    assert results[0].keys() == results[1].keys()
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


PREPARED: dict[str, Callable[[nn.Module], object]] = {
    "train": lambda m: m,
    "eval": lambda m: m.eval(),
    "frozen": lambda m: m.freeze(3),
    "norms_in_eval": lambda m: [n.eval() for n in m.modules() if isinstance(n, nn.BatchNorm2d)],
    "cumulative": lambda m: [
        setattr(n, "momentum", None) for n in m.modules() if isinstance(n, nn.BatchNorm2d)
    ],
    "double": lambda m: m.double(),
    "stock": lambda m: setattr(m, "backend", "reference"),
    "hooked": lambda m: m.features[5][1].block[1].register_forward_hook(lambda *args: None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PREPARED)
def test_same_step(name: str) -> None:
    """Drop-path and dropout draw the same, statistics and their counters move once."""
    x = X.double() if name == "double" else X
    assert_same_step(with_and_without(PREPARED[name]), x)


def test_against_torchvision() -> None:
    models = pair().train()
    models.actual.set_grad_checkpointing()
    models.assert_alike(X)


def test_stock_would_update_statistics_twice() -> None:
    """What the second run is kept from: torch's own checkpoint does it."""
    stock = pair().train().stock
    before = {k: v.clone() for k, v in stock.named_buffers()}
    y = checkpoint.checkpoint(stock.features, X, use_reentrant=False)
    y.sum().backward()
    assert stock.features[1][0].block[0][1].num_batches_tracked == 2
    model = pair().train().actual
    model.set_grad_checkpointing()
    model(X).sum().backward()
    counters = [v for k, v in model.named_buffers() if k.endswith("num_batches_tracked")]
    assert {int(c) for c in counters} == {1}
    assert not torch.equal(
        before["features.1.0.block.0.1.running_mean"], model.features[1][0].block[0][1].running_mean
    )


def test_backward_twice() -> None:
    """Gradients add up; the statistics stay where the one forward has put them."""
    results = []
    for model in with_and_without():
        torch.manual_seed(0)
        y = model(X).square().mean()
        y.backward(retain_graph=True)
        y.backward()
        results.append({k: p.grad for k, p in model.named_parameters()})
        results[-1] |= dict(model.named_buffers())
    assert all(torch.equal(t, results[1][k]) for k, t in results[0].items())


def test_blocks_run_twice_and_keep_less(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[type] = []
    original = fused_forward.run
    monkeypatch.setattr(
        fused_forward, "run", lambda m, x: (runs.append(type(m)), original(m, x))[1]
    )

    def saved_bytes(model: nn.Module) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(X)
        size = sum(kept.values())
        y.sum().backward()
        return size

    fewer, all_ = (saved_bytes(model) for model in with_and_without())
    blocks = TINY.blocks
    assert runs.count(MBConv) == 2 * blocks + blocks
    assert fewer < 0.75 * all_


@pytest.mark.slow
def test_inputs_of_a_wholly_frozen_part_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[type] = []
    original = fused_forward.run
    monkeypatch.setattr(
        fused_forward, "run", lambda m, x: (runs.append(type(m)), original(m, x))[1]
    )
    model = EfficientNet(TINY).freeze(7)
    model.set_grad_checkpointing()
    model(X).sum().backward()
    assert runs.count(MBConv) == TINY.blocks


def test_without_gradients_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("checkpoint was called")

    monkeypatch.setattr(checkpoint, "checkpoint", refuse)
    model = EfficientNet(TINY).eval()
    model.set_grad_checkpointing()
    with torch.no_grad():
        model(X)
    with pytest.raises(AssertionError, match="checkpoint was called"):
        model(X)
    model.set_grad_checkpointing(False)
    assert model.grad_checkpointing is False
    model(X)


@pytest.mark.parametrize("backend", ["reference", "cpu:generic"])
def test_second_run_takes_the_backend_of_the_first(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward runs outside the context that forward ran in."""
    seen: list[str] = []
    original = fused_forward.run
    monkeypatch.setattr(
        fused_forward,
        "run",
        lambda m, x: (seen.append(backends.current_backend()), original(m, x))[1],
    )
    model = EfficientNet(TINY)
    model.set_grad_checkpointing()
    with backends.use_backend(backend):
        y = model(random_images(4, 48))
    forward = len(seen)
    y.sum().backward()
    assert len(seen) > forward
    assert set(seen) == {backend}
    assert backends.current_backend() == "auto"


def test_encoder_and_copies() -> None:
    model = EfficientNetFeatures(TINY).train()
    model.set_grad_checkpointing()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing(False)
    results = []
    for m in (model, twin):
        torch.manual_seed(0)
        sum(y.square().mean() for y in m(X)).backward()
        results.append({f"grad {k}": p.grad for k, p in m.named_parameters()})
        results[-1] |= {f"buffer {k}": v for k, v in m.named_buffers()}
    assert all(torch.equal(t, results[1][k]) for k, t in results[0].items())


def test_under_autocast() -> None:
    results = []
    for model in with_and_without():
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(X)
        y.float().square().mean().backward()
        results.append({k: p.grad for k, p in model.named_parameters()} | {"y": y.detach()})
    assert all(torch.equal(t, results[1][k]) for k, t in results[0].items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_where_something_else_records_the_operators() -> None:
    """Tracing and torch.func run straight through: there is no backward to save memory for."""
    model = pair().actual
    with torch.no_grad():
        y = model(X)
    model.set_grad_checkpointing()
    torch.testing.assert_close(torch.jit.trace(model, X)(X), y, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(X), y, rtol=1e-3, atol=1e-3)
    grads = torch.func.grad(lambda x: model(x).square().mean())(X)
    assert grads.abs().max() > 0


def test_through_torchvisions_own_network() -> None:
    """A stock block inside is run as it is."""
    model = EfficientNet(TINY).train()
    config = torchvision.models.efficientnet.MBConvConfig(1, 3, 1, 8, 8, 1)
    model.features[1][0] = torchvision.models.efficientnet.MBConv(config, 0.0, nn.BatchNorm2d)
    model.set_grad_checkpointing()
    model(X).sum().backward()
    assert model.features[1][0].block[0][1].num_batches_tracked == 1
    assert_alike({"y": model.eval()(X).detach()}, {"y": model(X).detach()})


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("place", ["stem", "block", "depthwise"])
def test_pytorchs_own_checkpoint_moves_statistics_as_stock(
    place: str, momentum: float | None
) -> None:
    """Its second run ends where the last tensor is saved; statistics and counts have moved."""
    results = []
    for backend in ("auto", "reference"):
        model = pair().train().actual
        module, channels = {
            "stem": (model.features[0], 3),
            "block": (model.features[2][0], model.features[2][0].block[0][0].in_channels),
            "depthwise": (model.features[2][0].block[1], model.features[2][0].block[1][0].groups),
        }[place]
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = momentum
        generator = torch.Generator().manual_seed(0)
        for scale in (1.0, 3.0):
            x = scale * torch.randn(4, channels, 16, 16, generator=generator)
            with backends.use_backend(backend):
                y = checkpoint.checkpoint(module, x.requires_grad_(), use_reentrant=False)
                y.sum().backward()
        results.append([b.double() for norm in norms for b in norm.buffers()])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def hook(model: nn.Module) -> object:
    return model.features[2][0].block[1][0].register_forward_hook(lambda *_: None)


def unhook(model: nn.Module) -> None:
    model.features[2][0].block[1][0]._forward_hooks.clear()


def replace_layer(model: nn.Module) -> None:
    model.features[2][0].block[1] = nn.Identity()


def global_hook(model: nn.Module) -> object:
    return nn.modules.module.register_module_forward_hook(lambda *_: None)


# What is done before forward, and what between forward and backward.
CHANGES: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]] = {
    "hook comes": (lambda m: None, hook),
    "hook goes": (hook, unhook),
    "hook of all modules comes": (lambda m: None, global_hook),
    "memory": (lambda m: None, lambda m: setattr(m, "memory", "lean")),
    "memory of a block": (
        lambda m: setattr(m, "memory", "lean"),
        lambda m: setattr(m.features[2][0], "memory", "fast"),
    ),
    "backend": (lambda m: None, lambda m: setattr(m, "backend", "reference")),
    "backend back": (
        lambda m: setattr(m, "backend", "reference"),
        lambda m: setattr(m, "backend", "auto"),
    ),
    "method": (
        lambda m: None,
        lambda m: setattr(m.features[2][0].block, "forward", m.features[2][0].block.forward),
    ),
    "layer replaced": (lambda m: None, replace_layer),
}


@pytest.mark.parametrize("retain", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("name", CHANGES)
def test_second_run_repeats_what_the_first_chose(name: str, retain: bool) -> None:
    """The step is that of the network as it was in forward."""
    before, between = CHANGES[name]
    results = []
    for changed in (True, False):
        model = pair().train().actual
        model.set_grad_checkpointing(changed)
        before(model)
        parameters = dict(model.named_parameters())
        torch.manual_seed(0)
        y = model(X).square().mean()
        handle = between(model) if changed else None
        try:
            if retain:
                y.backward(retain_graph=True)
            y.backward()
        finally:
            if hasattr(handle, "remove"):
                handle.remove()
        results.append({k: p.grad for k, p in parameters.items()} | dict(model.named_buffers()))
    assert results[0].keys() <= results[1].keys()
    for key, tensor in results[0].items():
        assert torch.equal(tensor, results[1][key]), key


@pytest.mark.parametrize("first", [False, True], ids=["in_backward", "in_forward"])
@pytest.mark.parametrize("kind", ["function", "dispatch", "use_backend"])
def test_modes_in_one_of_the_runs(kind: str, first: bool) -> None:
    class Functions(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    class Operators(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    modes = {
        "function": Functions,
        "dispatch": Operators,
        "use_backend": lambda: backends.use_backend("reference"),
    }
    results = []
    for checkpoints in (True, False):
        model = pair().train().actual
        model.set_grad_checkpointing(checkpoints)
        torch.manual_seed(0)
        with modes[kind]() if first else contextlib.nullcontext():
            y = model(X).square().mean()
        with contextlib.nullcontext() if first or not checkpoints else modes[kind]():
            y.backward()
        results.append({k: p.grad for k, p in model.named_parameters()})
        results[-1] |= dict(model.named_buffers())
    assert all(torch.equal(t, results[1][k]) for k, t in results[0].items())
