"""Hooks of every kind run as often as in torchvision's network, see the same, and may interfere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

import effnet_fast
from effnet_fast.modules import recognition, structure
from networks import Pair, assert_alike, pair, random_images, run_network

# One module of each kind in a block with expansion and residual, in one without, and around them.
PATHS = [
    "",
    "features",
    "features.0",
    "features.0.0",
    "features.0.2",
    "features.1.0.block.0.1",
    "features.1.0.block.1",
    "features.5.1",
    "features.5.1.block",
    "features.5.1.block.0",
    "features.5.1.block.0.0",
    "features.5.1.block.0.1",
    "features.5.1.block.0.2",
    "features.5.1.block.1.0",
    "features.5.1.block.1.1",
    "features.5.1.block.1.2",
    "features.5.1.block.2",
    "features.5.1.block.2.avgpool",
    "features.5.1.block.2.fc1",
    "features.5.1.block.2.activation",
    "features.5.1.block.2.scale_activation",
    "features.5.1.block.3",
    "features.5.1.block.3.0",
    "features.5.1.block.3.1",
    "features.5.1.stochastic_depth",
    "features.8.1",
    "avgpool",
    "classifier.1",
]
KINDS = ["forward", "forward_pre", "full_backward", "full_backward_pre"]

Calls = list[tuple[str, list[Tensor]]]


def tensors(*groups: object) -> list[Tensor]:
    """Copies of the tensors among a hook's arguments."""
    flat: list[Tensor] = []
    for group in groups:
        for item in group if isinstance(group, tuple) else (group,):
            if isinstance(item, Tensor):
                flat.append(item.detach().clone())
    return flat


def recorder(calls: Calls, name: str) -> Callable[..., None]:
    """A hook that records the name and what it was shown."""

    def hook(module: nn.Module, *args: object) -> None:
        calls.append((name or type(module).__name__, tensors(*args)))

    return hook


def register(module: nn.Module, kind: str, hook: Callable[..., Any]) -> Any:
    if kind == "full_backward":
        return module.register_full_backward_hook(hook)
    if kind == "full_backward_pre":
        return module.register_full_backward_pre_hook(hook)
    return getattr(module, f"register_{kind}_hook")(hook)


def outcome(run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor] | str:
    """Results of the run, or the first words of the error it raised."""
    try:
        return run()
    except RuntimeError as error:
        return str(error)[:40]


def assert_same_calls(ours: Calls, theirs: Calls) -> None:
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert_alike(
        *(
            {
                f"shown {call}.{position} of {name}": tensor
                for call, (name, shown) in enumerate(calls)
                for position, tensor in enumerate(shown)
            }
            for calls in (ours, theirs)
        )
    )


def assert_same_with_hooks(models: Pair, install: Callable[[nn.Module, Calls], object]) -> Calls:
    """Installs recording hooks on ours and torchvision's, runs both, and compares everything."""
    x = random_images(4, 48)
    results, recorded = [], []
    for model in models.models:
        calls: Calls = []
        handles = install(model, calls)
        results.append(outcome(lambda model=model: run_network(model, x)))
        recorded.append(calls)
        for handle in handles:  # type: ignore[attr-defined]
            handle.remove()
    ours, theirs = results
    if isinstance(theirs, str):
        assert ours == theirs
        return recorded[1]
    assert isinstance(ours, dict), ours
    assert_alike(ours, theirs)
    assert_same_calls(*recorded)
    return recorded[1]


def install_on(path: str, kind: str) -> Callable[[nn.Module, Calls], list[Any]]:
    """An installer of one recording hook."""

    def install(model: nn.Module, calls: Calls) -> list[Any]:
        return [register(model.get_submodule(path), kind, recorder(calls, path))]

    return install


def without_inplace(model: nn.Module) -> None:
    """Stock refuses backward hooks on what SiLU, Dropout or the residual then overwrite."""
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
        if type(module).__name__ == "MBConv":
            module.use_res_connect = False


@pytest.mark.parametrize(
    ("kind", "training"),
    [
        ("forward", False),
        ("forward", True),
        ("forward_pre", False),
        ("forward_pre", True),
        ("full_backward", True),
        ("full_backward_pre", False),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_hook_on_one_module(path: str, kind: str, training: bool) -> None:
    models = pair()
    models.train(training)
    calls = assert_same_with_hooks(models, install_on(path, kind))
    assert len(calls) == 1 or "backward" in kind  # which stock may refuse


@pytest.mark.parametrize("kind", ["full_backward", "full_backward_pre"])
@pytest.mark.parametrize("path", [path for path in PATHS if "stochastic_depth" not in path])
def test_backward_hook_where_nothing_is_in_place(path: str, kind: str) -> None:
    models = pair().apply(without_inplace)
    assert len(assert_same_with_hooks(models, install_on(path, kind))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_global_hook(kind: str, training: bool) -> None:
    models = pair()
    if "backward" in kind:
        models.apply(without_inplace)
    models.train(training)
    infix = kind if "backward" in kind or kind == "forward_pre" else "forward"
    registration = getattr(nn_module, f"register_module_{infix}_hook")

    calls = assert_same_with_hooks(models, lambda _, calls: [registration(recorder(calls, ""))])
    counts = Counter(name for name, _ in calls)
    assert counts["Conv2d"] == sum(isinstance(m, nn.Conv2d) for m in models.stock.modules())
    assert counts["BatchNorm2d"] == sum(
        isinstance(m, nn.BatchNorm2d) for m in models.stock.modules()
    )
    assert counts["MBConv"] == 10
    assert counts["StochasticDepth"] == (0 if "backward" in kind else 4)


@pytest.mark.parametrize(
    "path", ["features.0.1", "features.5.1.block.0.1", "features.5.1.block.1.0", "features.5.1"]
)
def test_hooks_may_replace_values(path: str) -> None:
    def change(model: nn.Module) -> None:
        module = model.get_submodule(path)
        module.register_forward_hook(lambda m, args, y: y * 1.5 + 0.1)
        module.register_forward_pre_hook(lambda m, args: (args[0] - 0.2,))

    models = pair()
    before = models.actual(random_images(2, 48))
    after = models.apply(change).assert_alike(random_images(2, 48))["y"]
    assert not torch.allclose(before, after)


def test_backward_hooks_may_replace_gradients() -> None:
    def change(model: nn.Module) -> None:
        block = model.features[5][1].block
        block[1][0].register_full_backward_hook(lambda m, grads, _: (grads[0] * 3,))
        block[2].register_full_backward_pre_hook(lambda m, grads: (grads[0] * -2,))

    x = random_images(2, 48)
    models = pair()
    before = run_network(models.actual, x)["grad x"]
    after = models.apply(change).assert_alike(x)["grad x"]
    assert not torch.allclose(before, after)


def test_hooks_with_keywords_and_order() -> None:
    def install(model: nn.Module, calls: Calls) -> list[Any]:
        conv = model.get_submodule("features.4.0.block.1.0")
        first, last = recorder(calls, "first"), recorder(calls, "last")
        return [
            conv.register_forward_hook(last),
            conv.register_forward_hook(first, prepend=True),
            conv.register_forward_pre_hook(
                lambda m, args, kwargs: first(m, args), with_kwargs=True
            ),
            conv.register_forward_hook(
                lambda m, args, kwargs, y: last(m, args, y), with_kwargs=True, always_call=True
            ),
        ]

    calls = assert_same_with_hooks(pair(), install)
    assert [name for name, _ in calls] == ["first", "first", "last", "last"]


def test_removed_hooks_leave_no_trace() -> None:
    models = pair()
    x = random_images(2, 48)
    with torch.no_grad():
        before = models.actual(x)
        for path in PATHS:
            register(models.actual.get_submodule(path), "forward", lambda *_: None).remove()
        assert torch.equal(models.actual(x), before)


def test_hooks_on_tensors_and_parameters() -> None:
    x = random_images(2, 48)
    seen = []
    for model in pair().models:
        # By parameter: a fused block hands out the gradients of all of its own at once.
        grads: list[list[Tensor]] = []
        for path in ("features.0.0", "features.5.1.block.1.1", "features.5.1.block.2.fc1"):
            weight = model.get_submodule(path).weight
            own: list[Tensor] = []
            weight.register_hook(lambda grad, own=own: own.append(grad.clone()) or grad * 2)
            weight.register_post_accumulate_grad_hook(lambda p, own=own: own.append(p.grad.clone()))
            grads.append(own)
        run_network(model, x)
        seen.append([grad for own in grads for grad in own])
    assert len(seen[0]) == len(seen[1]) == 6
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_features_taken_out_by_hooks_have_gradients() -> None:
    """Feature extraction: a loss on the outputs of inner blocks alone."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        handles = [
            model.features[i].register_forward_hook(lambda m, a, y: outputs.append(y))
            for i in (2, 4, 6)
        ]
        model(x)
        for handle in handles:
            handle.remove()
        return sum((y.square().mean() for y in outputs), torch.zeros((), dtype=x.dtype))

    models = pair()
    x = random_images(2, 48)
    grads = {}
    for name, model in (("ours", models.actual), ("theirs", models.stock)):
        loss(model, x).backward()
        grads[name] = {k: p.grad for k, p in model.named_parameters()}
    for key, expected in grads["theirs"].items():
        actual = grads["ours"][key]
        assert (actual is None) == (expected is None), key
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_stock_path_does_not_look_for_what_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock is the yardstick of the benchmarks: it takes no longer than torchvision's modules."""
    model = pair().actual

    def fail(module: nn.Module, *_: object) -> None:
        raise AssertionError("looked at")

    monkeypatch.setattr(recognition, "recognise", fail)
    monkeypatch.setattr(structure, "structure_of", fail)
    with torch.inference_mode(), effnet_fast.use_backend("reference"):
        model(random_images(1, 48))
    with torch.inference_mode(), pytest.raises(AssertionError, match="looked at"):
        model(random_images(1, 48))
