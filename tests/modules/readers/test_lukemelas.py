"""Blocks of efficientnet_pytorch and of its copies, fused by `accelerate`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lukemelas
import surgery
from effnet_fast import accelerate, restore
from effnet_fast.modules import fused_forward
from effnet_fast.modules.explain import explain
from effnet_fast.modules.structure import structure_of
from lukemelas import ANY_PACKAGE, block, copies, exact, images, run, stacked
from replacing import replace_method
from tolerances import assert_parity, dense_strides

pytestmark = pytest.mark.filterwarnings("ignore:'saved_variables' is deprecated")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
DRAWS = 6  # of images: the gradient of a bias in squeeze-and-excitation has four numbers in each
# Options of a block, and the size of its images.
CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "dynamic": ({}, (9, 11)),
    "dynamic_stride": ({"stride": [2], "kernel_size": 5}, (9, 12)),
    "odd_fed_even": ({"stride": [2], "size": [7, 9]}, (8, 10)),
    "even_fed_odd": ({"stride": [2], "size": [8, 8], "expand_ratio": 1}, (9, 11)),
    "no_squeeze": ({"size": [7, 9], "se_ratio": None, "kernel_size": 5}, (8, 8)),
    "no_expansion": ({"expand_ratio": 1}, (9, 7)),
    "another_width": ({"output_filters": 24, "size": [8, 8]}, (7, 8)),
}
RELU6 = ({"relu_fn": "relu6", "se_ratio": None, "size": [8, 8]}, (9, 9))  # as EfficientNet-Lite has


@pytest.fixture
def fused() -> Iterator[list[Any]]:
    """What the fused op has given so far."""
    with lukemelas.counted(fused_forward, "_run_block") as given:
        yield given


def check(given: list[Any], module: nn.Module, xs: list[Tensor], rate: float | None) -> None:
    """Holds a block to the rule of parity, its results over several images stacked."""
    fast, stock, double = copies(module, 3)
    given.clear()
    actual = stacked(lambda m, x: run(m, x, rate), accelerate(fast), xs)
    assert len(given) == len(xs)
    assert None not in given
    expected = stacked(lambda m, x: run(m, x, rate), stock, xs)
    truth = stacked(lambda m, x: exact(m, x, rate), double.double(), xs)
    assert_parity(actual, expected, truth, xs[0].dtype)
    assert dense_strides(fast(xs[0].float())) == dense_strides(stock(xs[0].float()))


@DTYPES
@ANY_PACKAGE
def test_parity(package: str, dtype: torch.dtype, fused: list[Any]) -> None:
    cases = [*CASES.values(), *([RELU6] if "lite" in package else [])]
    for options, size in cases:
        module = block(package, **options)
        xs = images(*size, dtype, DRAWS)
        check(fused, module.eval(), xs, 0.5)
        check(fused, module.train(), xs, 0.5)
        if not options:
            check(fused, module, xs, None)


@ANY_PACKAGE
def test_the_rows_that_stock_drops_are_dropped(package: str, fused: list[Any]) -> None:
    module = block(package)
    fast, stock = accelerate(copy.deepcopy(module)), module
    x = torch.randn(16, lukemelas.CHANNELS, 5, 5)
    for gradient in (False, True):
        for rate in (None, 0, 0.0, 0.3, 0.9, 1):
            results = []
            for each in (fast, stock):
                torch.manual_seed(1)
                with torch.set_grad_enabled(gradient):
                    results.append(each(x, drop_connect_rate=rate) - x)
            dropped = [(y == 0).flatten(1).all(1) for y in results]
            assert torch.equal(*dropped), rate
            assert bool(dropped[0].any()) == (rate in (0.3, 0.9))
            torch.testing.assert_close(*results, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert len(fused) == 12


@ANY_PACKAGE
def test_a_rate_that_stock_does_not_take(package: str, fused: list[Any]) -> None:
    x = images(5, 5, torch.float32)[0]
    for training in (False, True):
        module = accelerate(block(package)).train(training)
        with pytest.raises(AssertionError, match="must be in range"):
            module(x, 1.5)
        with pytest.raises(AssertionError, match="must be in range"):
            module(x, torch.tensor(2.0))
        if not training:
            module(x, torch.tensor(0.5))
        assert not fused
        alone = accelerate(block(package, stride=[1])).train(training)  # which adds no input
        alone(x, 1.5)
        assert len(fused) == 1
        fused.clear()


@ANY_PACKAGE
def test_a_list_of_strides_is_read_anew(package: str, fused: list[Any]) -> None:
    module = block(package, stride=[2], size=[8, 8]).eval()
    fast, (x,) = accelerate(copy.deepcopy(module)), images(8, 8, torch.float32)
    assert fast._depthwise_conv.stride == [2, 2]
    for stride in (2, 1, 2):
        for each in (fast, module):
            each._depthwise_conv.stride[:] = [stride, stride]
        torch.testing.assert_close(fast(x), module(x), rtol=1e-4, atol=1e-4)
    assert len(fused) == 3
    for odd in ([True, True], [2, 1], [1], [3, 3]):
        fast._depthwise_conv.stride[:] = odd
        assert "stride" in str(explain(fast))


@ANY_PACKAGE
def test_static_padding_is_read_at_each_call(package: str, fused: list[Any]) -> None:
    module = block(package, stride=[2], size=[8, 8]).eval()
    fast, (x,) = accelerate(copy.deepcopy(module)), images(9, 9, torch.float32)
    for sides in ((0, 1, 0, 1), (1, 1, 1, 1), (0, 0, 0, 0), (3, 0, 4, 2)):
        for each in (fast, module):
            each._depthwise_conv.static_padding.padding = sides
        torch.testing.assert_close(fast(x), module(x), rtol=1e-4, atol=1e-4)
    assert len(fused) == 4
    odd: tuple[tuple[Any, float], ...] = (
        ([0, 1, 0, 1], 0.0), ((1, 1, 1, 1), 2.0), ((1, 1, -1, 1), 0.0), ((1, 1), 0.0)
    )  # fmt: skip
    for sides, value in odd:
        for each in (fast, module):
            each._depthwise_conv.static_padding.padding = sides
            each._depthwise_conv.static_padding.value = value
        assert str(explain(fast)).startswith("_depthwise_conv.static_padding pads")
        assert torch.equal(fast(x), module(x))
    assert len(fused) == 4


@ANY_PACKAGE
def test_images_that_a_padding_does_not_fill(package: str) -> None:
    """PyTorch's own error, with the statistics that stock has seen by then."""
    module = block(package, stride=[2], size=[8, 8], kernel_size=5)
    fast, (x,) = accelerate(copy.deepcopy(module)), images(1, 1, torch.float32)
    for each in (fast, module):
        with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            each(x)
    for name, buffer in module.named_buffers():
        assert torch.equal(fast.get_buffer(name), buffer), name


CHANGES: dict[str, Callable[[Any], object]] = {
    "another_activation": lambda m: setattr(m, "_swish", nn.GELU()),
    "hook": lambda m: m._swish.register_forward_hook(lambda *_: None),
    "hook_of_a_padding": lambda m: m._depthwise_conv.static_padding.register_forward_hook(
        lambda *_: None
    ),
    "padding_of_another_class": lambda m: setattr(
        m._depthwise_conv, "static_padding", nn.ReflectionPad2d(1)
    ),
    "padding_beside_it": lambda m: setattr(m._project_conv, "padding", (1, 1)),
    "dilation": lambda m: setattr(m._project_conv, "dilation", (2, 2)),
    "plain_convolution": lambda m: setattr(m, "_project_conv", nn.Conv2d(64, 16, 1, bias=False)),
    "another_child": lambda m: m.add_module("more", nn.Identity()),
    "another_order": lambda m: m._modules.update(_bn1=m._modules.pop("_bn1")),
    "patched_forward": lambda m: surgery.patch_forward(m._bn1, 2.0),
    "hidden_child": lambda m: m.__dict__.update(_bn1=nn.Identity()),
    "hidden_padding": lambda m: m._depthwise_conv.__dict__.update(
        static_padding=nn.ZeroPad2d((2, 0, 2, 0))
    ),
}
FLAGS = {"_has_se": False, "has_se": False}


@ANY_PACKAGE
def test_what_is_changed_runs_as_stock(package: str, fused: list[Any]) -> None:
    (x,) = images(6, 7, torch.float32)
    for name, change in CHANGES.items():
        module = block(package, size=[8, 8], id_skip=False).eval()
        fast = accelerate(copy.deepcopy(module))
        fast(x)
        assert len(fused) == 1, name
        for each in (fast, module):
            torch.manual_seed(0)
            change(each)
        assert explain(fast) is not None, name
        assert torch.equal(fast(x), module(x)), name
        assert len(fused) == 1
        fused.clear()


@ANY_PACKAGE
def test_children_that_forward_does_not_run(package: str) -> None:
    module = accelerate(block(package)).eval()
    assert explain(module) is None
    for flag in FLAGS.keys() & vars(module).keys():
        setattr(module, flag, False)
        assert str(explain(module)).startswith(" has children")
        setattr(module, flag, True)
    if package == "segmentation_models_pytorch":
        module._has_expansion = False
        assert str(explain(module)) == "_expand_conv is Conv2dDynamicSamePadding, not Identity"
    else:
        module._block_args = module._block_args._replace(expand_ratio=1)
        assert str(explain(module)).startswith(" has children")


@ANY_PACKAGE
def test_code_that_is_replaced_is_run(
    package: str, fused: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as stock runs it."""
    home, parts = lukemelas.modules(package)
    module = block(package, size=[8, 8])
    fast = accelerate(copy.deepcopy(module))
    targets: list[tuple[Any, str]] = [
        (home.MBConvBlock, "forward"), (home, "drop_connect"), (torch, "rand"),
        (parts.Conv2dStaticSamePadding, "forward"), (nn.ZeroPad2d, "forward"),
        (type(module._expand_conv.static_padding), "forward"), (torch, "sigmoid"),
        (torch.nn.functional, "pad"),
    ]  # fmt: skip
    if package != "segmentation_models_pytorch":
        own = parts.SwishImplementation
        targets += [(own, name) for name in ("forward", "backward", "apply")]
        targets.append((torch.Tensor, "__rsub__"))
        targets += [(parts.MemoryEfficientSwish, "forward"), (parts, "SwishImplementation")]
    (x,) = images(6, 7, torch.float32)
    for target in targets:
        run(fast, x, 0.5)
        assert len(fused) == 1
        with monkeypatch.context() as patch:
            calls = replace_method(patch, *target)
            if target[1] == "SwishImplementation":  # a class: its wrapper has no `apply`
                patch.setattr(*target, type(own)("Own", (own,), {}))
                assert "SwishImplementation is replaced" in str(explain(fast))
                calls.append(None)
            counts = []
            for each in (fast, module):
                run(each, x, 0.5)
                counts.append(len(calls))
            assert counts[1] == 2 * counts[0] > 0 or target[1] == "SwishImplementation", target
        assert len(fused) == 1, target
        fused.clear()
        assert explain(fast) is None


def test_an_activation_of_one_package_is_not_known_in_another() -> None:
    """Its code is watched where its own package's blocks are."""
    from efficientnet_pytorch.utils import MemoryEfficientSwish
    from timm.models._efficientnet_blocks import InvertedResidual

    accelerate(block("efficientnet_pytorch"))
    module = InvertedResidual(8, 8, exp_ratio=4)
    module.bn1.act = MemoryEfficientSwish()
    module.bn2.act = MemoryEfficientSwish()
    accelerate(module, memory="lean")
    assert "act is MemoryEfficientSwish" in str(explain(module))


@pytest.mark.parametrize("name", ["b0", "lite0", "encoder"])
def test_networks(name: str, fused: list[Any]) -> None:
    if name == "encoder":
        lukemelas.modules("segmentation_models_pytorch")
        from segmentation_models_pytorch.encoders import get_encoder

        model = get_encoder("efficientnet-b0", weights=None)
    elif name == "lite0":
        from efficientnet_lite_pytorch import EfficientNet

        model = EfficientNet.from_name("efficientnet-lite0")
    else:
        from efficientnet_pytorch import EfficientNet

        model = EfficientNet.from_name("efficientnet-b0")
    x, stock = torch.randn(2, 3, 64, 64), copy.deepcopy(model).eval()
    assert accelerate(model) is model
    assert all(explain(each) is None for each in model._blocks)
    model.train()(x)
    assert len(fused) == len(model._blocks) == 16
    model.load_state_dict(stock.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), stock(x), rtol=1e-3, atol=1e-4)
    restore(model)
    assert type(model._blocks[0]) is type(stock._blocks[0])


def test_what_a_block_is_read_as() -> None:
    found = structure_of(accelerate(block("efficientnet_pytorch", size=[8, 8], stride=[2])), 0.5)
    assert found.depthwise.geometry == ((3, 3), (2, 2), (0, 1, 0, 1))
    assert (found.activation, found.se_activation, found.gate) == ("silu", "silu", "sigmoid")
    assert (found.residual, found.drop_probability) == (False, 0.0)
    found = structure_of(accelerate(block("efficientnet_pytorch")), 0.5)
    assert found.depthwise.geometry.padding is None
    assert (found.residual, found.drop_probability, found.drop_mode) == (True, 0.5, "uniform")
