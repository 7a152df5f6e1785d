"""What a user sees has the strides that torchvision's network gives it, whatever runs inside."""

from __future__ import annotations

import contextlib
import copy
import pickle
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

import effnet_fast
import networks
from effnet_fast.models import EfficientNet, EfficientNetFeatures, features_plan
from effnet_fast.modules import layers
from effnet_fast.ops import layout
from networks import MINI, Pair, random_images
from tolerances import dense_strides

LAST = torch.channels_last
X = random_images(2, 48)
# Of images, and of the model: whether they are channels_last.
LAYOUTS = pytest.mark.parametrize(
    ("images", "weights"),
    [(False, False), (True, False), (False, True), (True, True)],
    ids=["contiguous", "images", "weights", "both"],
)
MODES = pytest.mark.parametrize("mode", ["eval", "no_grad", "train"])
PATHS = [
    "",
    "features",
    "features.0",
    "features.0.0",
    "features.0.2",
    "features.1",
    "features.2.0",
    "features.2.0.block",
    "features.2.0.block.0",
    "features.2.0.block.0.0",
    "features.2.1.block.1.1",
    "features.2.1.block.2",
    "features.2.1.block.2.fc1",
    "features.2.1.block.3.0",
    "features.2.1.stochastic_depth",
    "features.3.0",
    "features.4",
    "features.4.1",
    "avgpool",
]
MAPS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "features": lambda m, x: m.features(x),
    "stem": lambda m, x: m.features[0](x),
    "slice": lambda m, x: m.features[:3](x),
    "rest": lambda m, x: m.features[2:](m.features[:2](x)),
    "stage": lambda m, x: m.features[2](m.features[1](m.features[0](x))),
    "block": lambda m, x: m.features[1][0](m.features[0](x)),
    "layer": lambda m, x: m.features[2][0].block[0](m.features[:2](x)),
    "head": lambda m, x: m.features[-1](m.features[:-1](x)),
    "pixels": lambda m, x: m.features(x[:, :, :1, :1]),
    "fastai": lambda m, x: nn.Sequential(*list(m.children())[:-2])(x),
}


def pair() -> Pair:
    """With contiguous weights: those of the calibrated state of 1x1 kernels are channels_last."""

    def lay_out(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)

    return networks.pair(MINI).apply(lay_out)


def laid(x: Tensor, last: bool) -> Tensor:
    return x.clone(memory_format=LAST if last else torch.contiguous_format)


def in_mode(models: Pair, mode: str, weights: bool) -> Pair:
    models.train(mode == "train")
    for model in models.models:
        model.requires_grad_(mode != "no_grad")
        if weights:
            model.to(memory_format=LAST)
    return models


def grad_mode(mode: str) -> contextlib.AbstractContextManager[Any]:
    return torch.no_grad() if mode == "no_grad" else contextlib.nullcontext()


def tensors(*groups: object) -> Iterator[Tensor]:
    for group in groups:
        for item in group if isinstance(group, tuple) else (group,):
            if isinstance(item, Tensor):
                yield item


@LAYOUTS
@MODES
def test_hooks(mode: str, images: bool, weights: bool) -> None:
    models = in_mode(pair(), mode, weights)
    for path in PATHS:
        seen: list[list[Any]] = []
        for model in models.models:
            shown: list[Any] = []

            def note(module: nn.Module, *args: object, shown: list[Any] = shown) -> None:
                shown.extend(t.stride() for t in tensors(*args))

            module = model.get_submodule(path)
            handles = [module.register_forward_pre_hook(note), module.register_forward_hook(note)]
            with grad_mode(mode):
                model(laid(X, images))
            seen.append(shown)
            for handle in handles:
                handle.remove()
        assert seen[0] == seen[1], path
        assert len(seen[0]) == 3


@pytest.mark.parametrize("images", [False, True], ids=["contiguous", "channels_last"])
def test_global_hook(images: bool) -> None:
    seen = []
    for model in pair().models:
        shown: list[Any] = []
        handle = nn_module.register_module_forward_hook(
            lambda m, x, y, shown=shown: shown.extend(t.stride() for t in tensors(x, y))
        )
        with handle:
            model(laid(X, images))
        seen.append(shown)
    assert seen[0] == seen[1]


@LAYOUTS
@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_maps(mode: str, images: bool, weights: bool, dtype: torch.dtype) -> None:
    models = in_mode(pair(), mode, weights)
    for model in models.models:
        model.to(dtype)
    for batch in (2, 1):
        x = laid(X[:batch].to(dtype), images)
        for name, run in MAPS.items():
            if mode == "train" and name == "pixels":
                continue  # one value per channel
            with grad_mode(mode):
                actual, stock = (run(model, x) for model in models.models)
            # Of a single pixel stock's strides depend on the kernel that it chooses.
            strides = dense_strides if name == "pixels" else Tensor.stride
            assert strides(actual) == strides(stock), name
            assert actual.dtype is dtype


@LAYOUTS
@MODES
def test_named_ways_to_maps(mode: str, images: bool, weights: bool) -> None:
    models = in_mode(pair(), mode, weights)
    x = laid(X, images)
    with grad_mode(mode):
        expected = []
        h = x
        for child in models.stock.features:
            h = child(h)
            expected.append(h.stride())
        assert models.actual.forward_features(x).stride() == expected[-1]
        y, maps = models.actual.forward_intermediates(x, extra_blocks=True)
        assert [m.stride() for m in (*maps, y)] == expected


@LAYOUTS
@pytest.mark.parametrize("mode", ["eval", "no_grad", "train", "plan", "deployed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_encoder(mode: str, images: bool, weights: bool, dtype: torch.dtype) -> None:
    model = EfficientNetFeatures(MINI).train(mode == "train").to(dtype)
    stock = networks.torchvision_network(MINI).features.train(mode == "train").to(dtype)
    model.plan = mode == "plan"
    if weights:
        model, stock = (m.to(memory_format=LAST) for m in (model, stock))
    x = laid(X[:1].to(dtype), images)
    run = effnet_fast.deploy(model) if mode == "deployed" else model
    with contextlib.nullcontext() if mode in ("eval", "train") else torch.no_grad():
        maps, h, expected = run(x), x, []
        for index, child in enumerate(stock):
            h = child(h)
            if index in model.feature_info.get("stage"):
                expected.append(h.stride())
    assert [m.stride() for m in maps] == expected


@LAYOUTS
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("create_graph", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("double", [False, True], ids=["fused", "stock"])
def test_gradients(
    training: bool, images: bool, weights: bool, create_graph: bool, double: bool
) -> None:
    """By autograd.grad, which shows the strides that backward gave."""
    models = in_mode(pair(), "train" if training else "eval", weights)
    seen = []
    for model in models.models:
        model.to(torch.float64 if double else torch.float32)
        x = laid(X.double() if double else X, images).requires_grad_()
        names, parameters = zip(*model.named_parameters(), strict=True)
        grads = torch.autograd.grad(
            model(x).square().sum(), [x, *parameters], create_graph=create_graph
        )
        again = ()
        if create_graph:
            again = torch.autograd.grad(grads[0].square().sum(), [x])
        assert weights or grads[0].stride() == x.stride()
        seen.append({
            name: dense_strides(grad)
            for name, grad in zip(("x", *names, "again"), (*grads, *again), strict=False)
        })  # fmt: skip
    assert seen[0] == seen[1]


def test_gradient_penalty_by_view() -> None:
    for training in (False, True):
        model = pair().train(training).actual
        x = X.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(x)[:, 0].sum(), x, create_graph=True)
        (grad.view(2, -1).norm(dim=1) - 1).square().mean().backward()
        assert x.grad is not None
        assert model.features[0][0].weight.grad.is_contiguous()


def test_grey_images_and_small_ones() -> None:
    """Shapes whose strides fit both layouts: PyTorch's own choice counts."""
    ours = EfficientNet(MINI, in_chans=1).eval()
    theirs = networks.torchvision_network(MINI).eval()
    theirs.features[0][0] = copy.deepcopy(ours.features[0][0])
    for size in (48, 32, 1):
        for images in (False, True):
            x = laid(random_images(1, size, channels=1), images)
            for run in (MAPS["features"], MAPS["stem"]):
                actual, stock = run(ours, x), run(theirs, x)
                assert dense_strides(actual) == dense_strides(stock), (size, images)
                assert images or actual.stride() == stock.stride(), size


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shape of every tensor that is converted."""
    found: list[Any] = []
    convert = layout._convert

    def note(x: Tensor, to: torch.memory_format) -> Tensor:
        found.append((to, tuple(x.shape)))
        return convert(x, to)

    monkeypatch.setattr(layout, "_convert", note)
    return found


class TestConversions:
    """Inside a forward nothing is converted that no one sees."""

    @MODES
    def test_none_in_a_forward(self, mode: str, conversions: list[Any]) -> None:
        model = in_mode(pair(), mode, weights=False).actual
        with grad_mode(mode):
            y = model(X)
        if mode != "no_grad":
            y.sum().backward()
        assert not conversions

    @MODES
    def test_what_comes_out(self, mode: str, conversions: list[Any]) -> None:
        model = in_mode(pair(), mode, weights=False).actual
        with grad_mode(mode):
            model.features(X)
            assert len(conversions) == 1
            model.forward_intermediates(X, (0, 2))
        assert len(conversions) == 1 + 2 + 1

    def test_around_a_hook(self, conversions: list[Any]) -> None:
        model = pair().actual
        model.features[2][1].block[1][0].register_forward_hook(lambda *_: None)
        model(X)
        before = [shape for to, shape in conversions if to is layout.NCHW]
        block = model.features[2][1]
        assert (2, block.block[0][0].in_channels, 12, 12) in before
        # The rest of its stage, and of the network, has none.
        assert len(conversions) <= 8

    def test_none_for_channels_last(self, conversions: list[Any]) -> None:
        model = pair().actual
        model.features[2].register_forward_hook(lambda *_: None)
        model.features(laid(X, True))
        assert not conversions


class View(nn.Module):
    """A user's own module, which relies on the layout."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1).view(x.shape) * 2


@pytest.mark.parametrize("training", [False, True])
def test_own_module_sees_stock_layout(training: bool) -> None:
    def change(model: nn.Module) -> None:
        model.features[2].append(View())
        model.features.insert(1, View())
        model.features[3][0].block[2].avgpool = nn.Sequential(View(), nn.AdaptiveAvgPool2d(1))

    pair().train(training).apply(change).assert_alike(X)


def test_a_patched_forward_sees_stock_layout() -> None:
    block = pair().actual
    forward = block.features[2][0].forward
    block.features[2][0].forward = lambda x: forward(x.view(len(x), -1).view(x.shape))
    block(X)


def test_a_hook_that_comes_and_goes_in_a_forward() -> None:
    """Each module is looked at when it is its turn."""
    model, seen = pair().actual, []

    def add(module: nn.Module, x: object, y: Tensor) -> None:
        module_handle = model.features[3].register_forward_hook(
            lambda m, x, y: seen.append((y.stride(), module_handle.remove()))
        )

    model.features[1].register_forward_hook(add)
    y = model.features(X)
    assert len(seen) == 1
    assert seen[0][0][1] > 1
    assert y.stride()[1] > 1


class TestSequential:
    def test_is_what_it_was(self) -> None:
        models = pair()
        assert repr(models.actual.features[1]).startswith("Sequential(\n  (0): MBConv(")
        assert isinstance(models.actual.features, nn.Sequential)
        assert type(models.actual.features[:2]) is features_plan.Sequential
        assert list(models.actual.state_dict()) == list(models.stock.state_dict())

    def test_is_copied_and_pickled(self) -> None:
        features = pair().actual.features
        for other in (copy.deepcopy(features), pickle.loads(pickle.dumps(features))):
            assert type(other) is features_plan.Sequential
            assert torch.equal(other(X), features(X))

    def test_plain_ones_do_too(self) -> None:
        """As in networks pickled by earlier versions."""
        models = pair()
        features = models.actual.features
        models.actual.features = nn.Sequential(*(
            nn.Sequential(*c) if type(c) is layers.Sequential else c for c in features
        ))  # fmt: skip
        models.assert_alike(X)
        assert models.actual.features(X).stride() == models.stock.features(X).stride()
        with torch.no_grad():
            assert models.actual.features(X).stride() == models.stock.features(X).stride()
            models.assert_alike(X, backward=False)

    def test_empty_or_of_another_kind(self) -> None:
        assert layers.Sequential()(X) is X
        assert layers.Sequential(nn.Flatten())(X).shape == (2, 3 * 48 * 48)
        assert layers.Sequential(nn.Flatten(), nn.Identity())(X).shape == (2, 3 * 48 * 48)


@pytest.mark.parametrize("how", ["instance", "class"])
def test_replaced_code_sees_stocks_layout(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that relies on contiguous activations of contiguous images."""
    model = EfficientNet(MINI).eval()
    original, seen = nn.Conv2d._conv_forward, []

    def looking(self: nn.Conv2d, x: Tensor, *rest: Any) -> Tensor:
        seen.append(x.view(len(x), -1))
        return original(self, x, *rest)

    if how == "class":
        monkeypatch.setattr(nn.Conv2d, "_conv_forward", looking)
    else:
        conv = model.features[2][0].block[1][0]
        conv._conv_forward = types.MethodType(looking, conv)
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
        model.features(torch.randn(2, 3, 32, 32))
    assert seen
