"""Head and pooling as one op in a network's forward: where it stands in, and where it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effnet_fast
from effnet_fast import EfficientNet, use_backend
from effnet_fast.modules import fused_forward
from networks import TINY, Pair, assert_alike, pair, random_images, run_network

IMAGES = 4


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, str]]:
    """Filled with (whether by batch statistics, backend) at each call of the op."""
    calls: list[tuple[bool, str]] = []
    original = fused_forward.pointwise_bn_silu_pool
    monkeypatch.setattr(
        fused_forward,
        "pointwise_bn_silu_pool",
        lambda *a: calls.append((a[-1].norms[0].training, a[-1].backend)) or original(*a),
    )
    return calls


def without_plan(models: Pair) -> Pair:
    models.actual.plan = False
    return models


@pytest.mark.parametrize("backward", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_taken_on_the_cpu(training: bool, backward: bool, taken: list[tuple[bool, str]]) -> None:
    models = without_plan(pair()).train(training)
    with torch.set_grad_enabled(backward):
        models.assert_alike(random_images(IMAGES, 48), backward=backward)
    assert taken == [(training, "cpu")]


def test_the_plan_comes_first(taken: list[tuple[bool, str]]) -> None:
    models = pair()
    with torch.no_grad():
        models.assert_alike(random_images(IMAGES, 48), backward=False)
    assert not taken


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "cpu:generic", "reference"])
def test_follows_the_backend(backend: str, taken: list[tuple[bool, str]]) -> None:
    models = pair().train()
    models.actual.backend = backend
    models.assert_alike(random_images(IMAGES, 48))
    models.actual.backend = "auto"
    with use_backend(backend):
        models.assert_alike(random_images(IMAGES, 48))
    assert taken == ([] if backend == "reference" else [(True, backend)] * 2)


def frozen_norm(model: nn.Module) -> None:
    model.features[8][1].eval()


def cumulative(model: nn.Module) -> None:
    model.features[8][1].momentum = None


def untracked(model: nn.Module) -> None:
    model.features[8][1].track_running_stats = False


def without_statistics(model: nn.Module) -> None:
    norm = model.features[8][1]
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def not_affine(model: nn.Module) -> None:
    model.features[8][1].weight = model.features[8][1].bias = None


def frozen(*names: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for name in names:
            model.get_parameter(name).requires_grad_(False)

    return change


STATES: dict[str, Callable[[nn.Module], object]] = {
    "frozen_norm": frozen_norm,
    "cumulative": cumulative,
    "untracked": untracked,
    "without_statistics": without_statistics,
    "not_affine": not_affine,
    "frozen_weight": frozen("features.8.0.weight"),
    "frozen_gamma": frozen("features.8.1.weight"),
    "frozen_head": frozen("features.8.0.weight", "features.8.1.weight", "features.8.1.bias"),
    "dropout": lambda m: m.classifier.__setitem__(0, nn.Dropout(0.5)),
    "no_classifier": lambda m: setattr(m, "classifier", nn.Identity()),
}


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
def test_taken_in_every_state(state: str, taken: list[tuple[bool, str]]) -> None:
    """Two steps, so that what the first leaves behind counts, too."""
    models = pair().train()
    models.apply(STATES[state])
    for seed in (0, 1):
        models.assert_alike(random_images(IMAGES, 48, seed=seed))
    assert taken == [(state != "frozen_norm", "cpu")] * 2


def test_frozen_features_with_a_classifier_in_training(taken: list[tuple[bool, str]]) -> None:
    """Linear probing: nothing of the head is kept for backward."""
    model = pair().actual.freeze().train()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dim()) or t, lambda t: t):
        y = model(random_images(IMAGES, 48))
    y.sum().backward()
    assert kept
    assert 4 not in kept
    assert taken == [(False, "cpu")]
    assert model.features[8][0].weight.grad is None
    assert model.classifier[1].weight.grad is not None


def hook(*_: Any) -> None:
    pass


class Own(nn.AdaptiveAvgPool2d):
    pass


OBSERVERS: dict[str, Callable[[Any], object]] = {
    "features": lambda m: m.features.register_forward_hook(hook),
    "head": lambda m: m.features[-1].register_forward_hook(hook),
    "head_backward": lambda m: m.features[-1].register_full_backward_hook(hook),
    "convolution": lambda m: m.features[-1][0].register_forward_pre_hook(hook),
    "norm": lambda m: m.features[-1][1].register_forward_hook(hook),
    "activation": lambda m: m.features[-1][2].register_forward_pre_hook(hook),
    "avgpool": lambda m: m.avgpool.register_forward_pre_hook(hook),
    "other_pool": lambda m: setattr(m, "avgpool", nn.AdaptiveMaxPool2d(1)),
    "pool_of_ones_own": lambda m: setattr(m, "avgpool", Own(1)),
    "no_pool": lambda m: setattr(m, "avgpool", nn.Identity()),
    "larger_pool": lambda m: setattr(m, "avgpool", nn.AdaptiveAvgPool2d((1, 2))),
    "patched_method": lambda m: setattr(m, "forward_features", m.forward_features),
    "patched_pool": lambda m: setattr(m.avgpool, "forward", m.avgpool.forward),
    "patched_features": lambda m: setattr(m.features, "forward", m.features.forward),
    "other_norm": lambda m: m.features[-1].__setitem__(1, nn.GroupNorm(1, m.num_features)),
    "other_activation": lambda m: m.features[-1].__setitem__(2, nn.Tanh()),
    "appended": lambda m: m.features.append(nn.Identity()),
    "max_pooling": lambda m: m.reset_classifier(5, "max"),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", OBSERVERS)
def test_what_is_seen_is_made(name: str, training: bool, taken: list[tuple[bool, str]]) -> None:
    model = pair().actual.train(training)
    OBSERVERS[name](model)
    if name in ("no_pool", "larger_pool"):
        model.classifier = nn.Identity()
    x = random_images(IMAGES, 48)
    stock = copy.deepcopy(model)
    stock.backend = "reference"
    assert_alike(run_network(model, x), run_network(stock, x))
    assert not taken


@pytest.mark.parametrize("method", ["forward_features", "forward_head"])
def test_a_subclass_is_heard(method: str, taken: list[tuple[bool, str]]) -> None:
    model = pair().actual.train()
    own = {method: lambda self, x: 0 * getattr(EfficientNet, method)(self, x)}
    model.__class__ = type("Own", (type(model),), own)
    y = model(random_images(IMAGES, 48))
    assert not taken
    if method == "forward_head":
        assert not y.any()


def test_what_a_hook_sees_is_what_the_others_compute(taken: list[tuple[bool, str]]) -> None:
    """A hook on the map changes the path, not the result."""
    model, x = pair().actual.train(), random_images(IMAGES, 48)
    other = copy.deepcopy(model)
    seen: list[Tensor] = []
    other.features.register_forward_hook(lambda m, args, y: seen.append(y))
    assert_alike(run_network(other, x), run_network(model, x))
    assert len(seen) == len(taken) == 1
    assert seen[0].shape == (IMAGES, model.num_features, 2, 2)


def test_hooks_on_the_layers_before_run(taken: list[tuple[bool, str]]) -> None:
    model = pair().actual.train()
    seen: list[int] = []
    for index, layer in enumerate(model.features[:-1]):
        layer.register_forward_hook(lambda *_, index=index: seen.append(index))
    model(random_images(IMAGES, 48))
    assert seen == list(range(8))
    assert taken == [(True, "cpu")]


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_dtype_of_pooled_features(autocast: bool, taken: list[tuple[bool, str]]) -> None:
    model = effnet_fast.EfficientNet(TINY, num_classes=0).train()
    x, dtypes = random_images(IMAGES, 48), []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for backend in ("auto", "reference"):
            model.backend = backend
            dtypes.append(model(x).dtype)
    assert taken == [(True, "cpu")]
    assert dtypes[0] == dtypes[1] == (torch.bfloat16 if autocast else torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_gradient_checkpointing(autocast: bool, taken: list[tuple[bool, str]]) -> None:
    model, x = pair().actual.train(), random_images(IMAGES, 48)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain, again = run_network(model, x), run_network(other, x)
    assert len(taken) == 2
    for name, tensor in plain.items():
        assert torch.equal(tensor, again[name]), name


def test_second_derivative(taken: list[tuple[bool, str]]) -> None:
    models = pair().train()
    results = []
    for model in models.models:
        torch.manual_seed(0)
        x = random_images(IMAGES, 48).requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        results.append({f"grad {k}": p.grad for k, p in model.named_parameters()})
    assert taken
    name = "grad features.8.0.weight"
    error = (results[0][name] - results[1][name]).norm() / results[1][name].norm()
    assert error < 1e-2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_transforms_see_the_layers(taken: list[tuple[bool, str]]) -> None:
    model, x = pair().actual, random_images(IMAGES, 48)
    torch.func.grad(lambda x: model(x).sum())(x)
    torch.jit.trace(model, x, check_trace=False)
    exported = torch.export.export(model, (x,)).graph
    assert not any("effnet_fast" in str(node.target) for node in exported.nodes)
    assert not taken


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_doctor_says_so(training: bool, taken: list[tuple[bool, str]]) -> None:
    model = pair().actual.train(training)

    def reason() -> str | None:
        blocks = effnet_fast.doctor(model).blocks
        return next(block.reason for block in blocks if block.name == "features.8")

    assert reason() is None
    model.avgpool.register_forward_hook(hook)
    assert (reason() is not None) is training
