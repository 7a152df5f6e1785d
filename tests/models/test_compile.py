"""torch.compile of the network: values of outputs, gradients and statistics, against stock's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

import networks
import tiers
from effnet_fast import backends, use_backend
from effnet_fast.models import EfficientNet, EfficientNetFeatures
from networks import MINI, assert_alike, random_images, run_network

pytestmark = [
    pytest.mark.slow,  # seconds of tracing each
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec"),
]
X = random_images(4, 32)
pair = functools.partial(networks.pair, MINI)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, **options: object) -> nn.Module:
    """The compiled network, which still names its parameters as the network does."""
    options = {"backend": "aot_eager", "fullgraph": True, **options}
    model.compile(**options)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("fullgraph", tiers.some((False, True), (True,)))
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_network(training: bool, fullgraph: bool) -> None:
    """Random draws too: under aot_eager the operators run one by one."""
    models = pair().train(training)
    compiled(models.actual, fullgraph=fullgraph)
    models.assert_alike(X)
    models.assert_alike(random_images(4, 32, seed=5))
    counts = torch._dynamo.utils.counters
    assert not counts["graph_break"]
    assert counts["stats"]["unique_graphs"] == 1


@pytest.mark.exhaustive
def test_dynamic_batch() -> None:
    models = pair()
    compiled(models.actual)
    for batch in (4, 3, 7):
        x = random_images(batch, 32)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            assert_alike({"y": models.actual(x)}, {"y": models.stock(x)})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def without_random_layers(model: nn.Module) -> None:
    """Compiled code may draw in another order."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0


@pytest.mark.exhaustive
@pytest.mark.parametrize("training", [False, True], ids=["fullgraph", "default"])
def test_inductor(training: bool) -> None:
    """Inference in one graph, and a training step, by generated code: a block of either kind."""
    small = replace(MINI, name="small", depth=0.5, baseline=MINI.baseline[:2])
    models = networks.pair(small).apply(without_random_layers).train(training)
    compiled(models.actual, backend="inductor", fullgraph=not training)
    with torch.set_grad_enabled(training):
        models.assert_alike(X, backward=training)


@pytest.mark.exhaustive
def test_compiled_notices_swapped_channels() -> None:
    models = pair()
    weight = models.actual.features[2][0].block[1][0].weight
    weight.data = weight.data.flip(0)
    compiled(models.actual)
    with pytest.raises(AssertionError, match="rms error"):
        models.assert_alike(X)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "trains": lambda m: m.train(),
    "load_state_dict": lambda m: m.load_state_dict(
        {k: v * 1.1 if v.is_floating_point() else v for k, v in m.state_dict().items()}
    ),
    "replaced_head": lambda m: m.classifier.__setitem__(1, nn.Linear(64, 5)),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", tiers.some(CHANGES, ("trains",)))
def test_changes_after_compilation_are_followed(name: str) -> None:
    models = pair()
    compiled(models.actual)
    before = models.assert_alike(X, backward=False)["y"]
    models.apply(CHANGES[name])
    after = models.assert_alike(X, backward=False)["y"]
    assert after.shape != before.shape or networks.rms(after - before) > 0.01


@pytest.mark.exhaustive
def test_named_backend_of_the_network() -> None:
    """A compiled network consists of PyTorch's own operators, whichever backend it has."""
    models = pair()
    for backend in ("reference", "cpu"):
        models.actual.backend = backend
        torch._dynamo.reset()
        models.assert_alike(X)
    with use_backend("cpu"):
        compiled(models.actual)
        models.assert_alike(X)
    models.assert_alike(X)


@pytest.mark.exhaustive
def test_autocast_inside_and_around() -> None:
    models = pair()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = models.stock(X)
        y = compiled(models.actual)(X)
    assert y.dtype is expected.dtype is torch.bfloat16
    assert networks.rms(y - expected) < 0.1 * networks.rms(expected)


@pytest.mark.exhaustive
def test_gradient_checkpointing() -> None:
    models = pair().train()
    models.actual.set_grad_checkpointing()
    compiled(models.actual)
    models.assert_alike(X)


@pytest.mark.exhaustive
def test_encoder_and_frozen_stages() -> None:
    state = networks.calibrated_state(MINI)
    results = []
    for compile_it in (False, True):
        model = EfficientNetFeatures(MINI, out_indices=(0, 2), stochastic_depth_prob=0.0)
        model.load_state_dict(state)
        model.train().freeze(1)
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compile_it else model
        maps = call(X)
        sum(m.square().mean() for m in maps).backward()
        named = {f"y {i}": m.detach() for i, m in enumerate(maps)}
        named |= {f"grad {k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
        results.append(named | {f"buffer {k}": v for k, v in model.named_buffers()})
    assert_alike(*results)


def test_intermediates() -> None:
    model = pair().actual
    run = torch.compile(model.forward_intermediates, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        y, maps = run(X, [0, -1])
        expected, others = model.forward_intermediates(X, [0, -1])
    assert_alike(
        {"y": y, "a": maps[0], "b": maps[1]}, {"y": expected, "a": others[0], "b": others[1]}
    )


def test_second_derivative_is_refused() -> None:
    """AOTAutograd's own error: nothing wrong comes out."""
    model = compiled(pair().actual)
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.square().sum().backward()


@pytest.mark.exhaustive
def test_compiled_module_wraps_and_saves() -> None:
    model = EfficientNet(MINI).eval()
    wrapped = torch.compile(model, backend="aot_eager")
    assert list(wrapped.state_dict()) == [f"_orig_mod.{k}" for k in model.state_dict()]
    results = run_network(wrapped, X, backward=False)
    assert_alike({"y": results["y"]}, {"y": model(X).detach()})
    assert backends.current_backend() == "auto"
