"""Dtypes, autocast and unusual inputs: the dtypes, values and errors that stock gives."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import networks
from effnet_fast import use_backend
from effnet_fast.models import EfficientNetFeatures
from halves import assert_errors, without_random_layers
from networks import TINY, pair, random_images, run_network, trio

X = random_images(4, 48)
MORE = random_images(16, 48)  # the largest error of a few in bf16 is one logit's chance
# Relative rms error of a network in each dtype; stock's own is about a third of it.
TOLERANCES = {torch.float16: 0.03, torch.bfloat16: 0.2, torch.float64: 1e-9}
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


@pytest.mark.slow
@HALVES
@MODES
def test_autocast(dtype: torch.dtype, training: bool) -> None:
    """fp32 parameters and statistics under autocast: output dtype, gradients, statistics."""
    models = trio().apply(without_random_layers).train(training)

    def run(model: nn.Module) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype):
            return run_network(model, MORE)

    assert_errors(run, models, MORE)


@pytest.mark.slow
@HALVES
def test_autocast_without_gradients(dtype: torch.dtype) -> None:
    """The whole-block kernels."""
    models = trio()

    def run(model: nn.Module) -> dict[str, Tensor]:
        with torch.no_grad(), torch.autocast("cpu", dtype):
            return {"y": model(X)}

    assert_errors(run, models, X)


@pytest.mark.slow
@HALVES
@MODES
def test_half_precision_networks(dtype: torch.dtype, training: bool) -> None:
    """model.half() and model.bfloat16(): parameters, buffers and images in one dtype."""
    models = trio().apply(without_random_layers).train(training)
    for model in (models.actual, models.stock):
        model.to(dtype)
    assert_errors(lambda model: run_network(model, X.to(dtype)), models, X)


@pytest.mark.slow
@MODES
def test_double(training: bool) -> None:
    models = pair().train(training)
    actual, stock = (run_network(model.double(), X.double()) for model in models.models)
    for name, tensor in stock.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@MODES
def test_norms_in_fp32_of_a_bf16_network(training: bool) -> None:
    """Mixed dtypes in one block; stock's convolution and batch_norm take them too."""
    models = pair().apply(without_random_layers).train(training)
    for model in models.models:
        model.bfloat16()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()
    actual, stock = (run_network(model, X.bfloat16()) for model in models.models)
    for name, tensor in stock.items():
        assert actual[name].dtype is tensor.dtype, name
    assert networks.rms(actual["y"] - stock["y"]) < 0.2 * networks.rms(stock["y"])


def test_dtypes_of_maps_under_autocast() -> None:
    state = networks.calibrated_state(TINY)
    model = EfficientNetFeatures(TINY).eval()
    model.load_state_dict(state)
    stock = pair().stock
    with torch.autocast("cpu", torch.bfloat16):
        maps = model(X)
        x = X
        for index, stage in enumerate(stock.features):
            x = stage(x)
            if f"features.{index}" in model.feature_info.module_name():
                assert maps.pop(0).dtype is x.dtype
    assert not maps


def test_autocast_region_ends_before_the_head() -> None:
    """Features in bf16 may be pooled and classified outside in fp32, as stock's may."""
    outputs = []
    for model in pair().models:
        with torch.autocast("cpu", torch.bfloat16):
            features = model.features(X)
        outputs.append(model.classifier(model.avgpool(features).flatten(1).float()))
    assert outputs[0].dtype is outputs[1].dtype is torch.float32
    assert networks.rms(outputs[0] - outputs[1]) < 0.2 * networks.rms(outputs[1])


def test_autocast_disabled_inside() -> None:
    models = pair()
    outputs = []
    for model in models.models:
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            outputs.append(model(X).detach())
    networks.assert_alike({"y": outputs[0]}, {"y": outputs[1]})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_moves_there_and_back(dtype: torch.dtype) -> None:
    """Whatever a pass in one dtype keeps does not outlive the move to another."""
    models = pair()
    before = models.assert_alike(X, backward=False)["y"]
    for model in models.models:
        model.to(dtype)
        with torch.no_grad():
            y = model(X.to(dtype))
        assert y.dtype is dtype
        assert networks.rms(y - before) < TOLERANCES[dtype] * networks.rms(before) + 1e-4
        model.float()
    models.assert_alike(X)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": lambda x: x[:, :, 3:-4, 2:-1],
    "every_other": lambda x: x[::2, :, ::2, ::2],
    "flipped": lambda x: x.flip(3),
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
    "from_uint8": lambda x: (
        (x * 64).clamp(-128, 127).to(torch.int8).permute(0, 2, 3, 1).permute(0, 3, 1, 2) / 64
    ),
}


@MODES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, training: bool) -> None:
    models = pair().train(training)
    models.actual.to(memory_format=torch.channels_last if layout == "transposed" else None)
    results = []
    for model in models.models:
        x = LAYOUTS[layout](random_images(4, 65)).requires_grad_()
        torch.manual_seed(0)
        y = model(x)
        y.square().mean().backward()
        grads = {f"grad {k}": p.grad for k, p in model.named_parameters()}
        results.append({"y": y.detach(), "grad x": x.grad} | grads)
        model.zero_grad()
    networks.assert_alike(*results)


def raised(model: nn.Module, x: Tensor) -> tuple[type, str]:
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)) as info:
        model(x).sum().backward()
    return info.type, str(info.value)


WRONG: dict[str, tuple[Callable[[nn.Module], object], Callable[[Tensor], Tensor]]] = {
    "double_images": (lambda m: m, lambda x: x.double()),
    "half_images": (lambda m: m, lambda x: x.half()),
    "bf16_images": (lambda m: m, lambda x: x.bfloat16()),
    "uint8_images": (lambda m: m, lambda x: x.byte()),
    "int64_images": (lambda m: m, lambda x: x.long()),
    "bf16_network": (lambda m: m.bfloat16(), lambda x: x),
    "double_network": (lambda m: m.double(), lambda x: x),
    "one_block_in_double": (lambda m: m.features[5][1].double(), lambda x: x),
    "meta_images": (lambda m: m, lambda x: x.to("meta")),
    "meta_network": (lambda m: m.to("meta"), lambda x: x),
    "four_channels": (lambda m: m, lambda x: torch.cat([x, x[:, :1]], 1)),
    "no_pixels": (lambda m: m, lambda x: x[:, :, :0]),
    "vector": (lambda m: m, lambda x: x.flatten()),
}


@MODES
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_integers_under_autocast_raise_what_stock_raises(
    training: bool, dtype: torch.dtype
) -> None:
    models = pair().train(training)
    with torch.autocast("cpu", torch.bfloat16):
        expected = raised(models.stock, X.to(dtype))
        assert raised(models.actual, X.to(dtype)) == expected


@MODES
@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_raise_what_stock_raises(name: str, training: bool) -> None:
    change, spoil = WRONG[name]
    models = pair().apply(change).train(training)
    expected = raised(models.stock, spoil(X))
    assert raised(models.actual, spoil(X)) == expected


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches_in_training(batch: int, backward: bool) -> None:
    models = pair().train()
    results = []
    for model in models.models:
        torch.manual_seed(0)
        try:
            y = model(random_images(1, 65)[:batch])
            if backward:
                y.sum().backward()
            grads = {f"grad {k}": p.grad for k, p in model.named_parameters() if backward}
            buffers = {f"buffer {k}": b for k, b in model.named_buffers()}
            results.append({"y": y.detach(), **grads, **buffers})
        except (RuntimeError, ValueError) as error:
            results.append({type(error).__name__ + str(error): torch.zeros(1)})
    networks.assert_alike(*results)


def test_batch_of_none_in_eval_with_gradients() -> None:
    results = [run_network(model, X[:0]) for model in pair().models]
    for name, tensor in results[1].items():
        assert results[0][name].shape == tensor.shape
        assert torch.equal(results[0][name], tensor), name


def test_float64_gradients_by_gradcheck() -> None:
    """The whole network against finite differences, once through our modules."""
    model = copy.deepcopy(pair().actual).double()
    x = random_images(1, 32)[:, :, :2, :3].double().requires_grad_()
    assert torch.autograd.gradcheck(model, (x,), atol=1e-4, fast_mode=True)


def test_named_backend_refuses_fp16_by_name() -> None:
    model = pair().actual.half()
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"cpu.*float16"):
        model(X.half())
