"""reference.dwconv_bn_silu against nn modules, finite differences and its own docstring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effnet_fast.reference import dwconv_bn_silu

GEOMETRIES = {
    # name: (kernel, stride, padding)
    "k3": (3, 1, None),
    "k3_stride_2": (3, 2, None),
    "k5": (5, 1, None),
    "k5_stride_2": (5, 2, None),
    "k1": (1, 1, None),
    "k7": (7, 1, None),
    "int_padding": (3, 1, 2),
    "no_padding": (3, 2, 0),
    "same_k3": (3, 2, (0, 1, 0, 1)),
    "same_k5": (5, 2, (1, 2, 1, 2)),
    "four_sides": (3, 1, (0, 3, 2, 1)),
}


def bn_arguments(channels: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {
        "bn_weight": torch.rand(channels, dtype=dtype) + 0.5,
        "bn_bias": torch.randn(channels, dtype=dtype),
        "running_mean": torch.randn(channels, dtype=dtype),
        "running_var": torch.rand(channels, dtype=dtype) + 0.5,
    }


def arguments(
    kernel: int = 3, shape: tuple[int, ...] = (2, 3, 7, 6), dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    channels = shape[1]
    x = torch.randn(shape, dtype=dtype)
    weight = torch.randn(channels, 1, kernel, kernel, dtype=dtype)
    return {"x": x, "weight": weight, **bn_arguments(channels, dtype)}


def by_modules(
    args: dict[str, Any], stride: int, padding: Any, training: bool
) -> tuple[Tensor, nn.BatchNorm2d]:
    """ZeroPad2d, Conv2d, BatchNorm2d and SiLU with the same parameters, and the norm."""
    weight = args["weight"]
    channels, _, kernel, _ = weight.shape
    padding = (kernel - 1) // 2 if padding is None else padding
    conv = nn.Conv2d(channels, channels, kernel, stride, groups=channels, bias=False)
    norm = nn.BatchNorm2d(channels)
    net = nn.Sequential(nn.ZeroPad2d(padding), conv, norm, nn.SiLU()).to(weight.dtype)
    net.train(training)
    with torch.no_grad():
        conv.weight.copy_(weight)
        norm.weight.copy_(args["bn_weight"])
        norm.bias.copy_(args["bn_bias"])
        norm.running_mean.copy_(args["running_mean"])
        norm.running_var.copy_(args["running_var"])
        return net(args["x"]), norm


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", GEOMETRIES)
class TestGeometries:
    def test_agrees_with_modules(self, name: str, training: bool) -> None:
        kernel, stride, padding = GEOMETRIES[name]
        args = arguments(kernel)
        expected, norm = by_modules(args, stride, padding, training)
        y = dwconv_bn_silu(**args, stride=stride, padding=padding, training=training)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(args["running_mean"], norm.running_mean)
        torch.testing.assert_close(args["running_var"], norm.running_var)

    def test_gradcheck(self, name: str, training: bool) -> None:
        kernel, stride, padding = GEOMETRIES[name]
        args = arguments(kernel, shape=(2, 2, 5, 4))
        statistics = args.pop("running_mean"), args.pop("running_var")

        def function(*tensors: Tensor) -> Tensor:
            mean, var = (s.clone() for s in statistics)
            return dwconv_bn_silu(
                *tensors, mean, var, stride=stride, padding=padding, training=training
            )

        inputs = tuple(tensor.requires_grad_() for tensor in args.values())
        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradgradcheck(training: bool) -> None:
    args = arguments(shape=(2, 2, 3, 3))
    mean, var = args.pop("running_mean"), args.pop("running_var")
    inputs = tuple(tensor.requires_grad_() for tensor in args.values())
    assert torch.autograd.gradgradcheck(
        lambda *tensors: dwconv_bn_silu(*tensors, mean.clone(), var.clone(), training=training),
        inputs,
    )


def test_running_statistics_by_hand() -> None:
    args = arguments()
    mean, var = args["running_mean"].clone(), args["running_var"].clone()
    dwconv_bn_silu(**args, training=True, momentum=0.3)
    z = nn.functional.conv2d(args["x"], args["weight"], padding=1, groups=3)
    z = z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(args["running_mean"], 0.7 * mean + 0.3 * z.mean(1))
    torch.testing.assert_close(args["running_var"], 0.7 * var + 0.3 * z.var(1, correction=1))


def test_eval_leaves_running_statistics_alone() -> None:
    args = arguments()
    before = args["running_mean"].clone(), args["running_var"].clone()
    dwconv_bn_silu(**args, momentum=1.0)
    assert torch.equal(args["running_mean"], before[0])
    assert torch.equal(args["running_var"], before[1])


def test_absent_vectors() -> None:
    args = arguments()
    args["bn_weight"].fill_(1)
    args["bn_bias"].fill_(0)
    expected = dwconv_bn_silu(**args, training=True)
    args |= dict.fromkeys(["bn_weight", "bn_bias", "running_mean", "running_var"])
    torch.testing.assert_close(dwconv_bn_silu(**args, training=True), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bn_dtype", [torch.float32, None], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_dtypes(dtype: torch.dtype, bn_dtype: torch.dtype | None, training: bool) -> None:
    """x and weight in one dtype, BN in another: y is in x's, gradients in their inputs'."""
    exact = arguments()
    args = {k: v.to(dtype if k in ("x", "weight") else bn_dtype or dtype) for k, v in exact.items()}
    inputs = [args[k].requires_grad_() for k in ("x", "weight", "bn_weight", "bn_bias")]
    expected = dwconv_bn_silu(**exact, training=training)
    actual = dwconv_bn_silu(**args, training=training)
    assert actual.dtype is dtype
    torch.testing.assert_close(actual.double(), expected, rtol=0.1, atol=0.1)
    for name in ("running_mean", "running_var"):
        assert args[name].dtype is (bn_dtype or dtype)
        torch.testing.assert_close(args[name].double(), exact[name], rtol=0.02, atol=0.02)
    actual.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype is tensor.dtype for tensor in inputs)


def test_double_input_with_float_parameters() -> None:
    args = {k: v if k == "x" else v.float() for k, v in arguments().items()}
    expected = dwconv_bn_silu(**{k: v.double() for k, v in args.items()}, training=True)
    y = dwconv_bn_silu(**args, training=True)
    torch.testing.assert_close(y, expected)
    assert args["running_mean"].dtype is torch.float32


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_layouts_and_inputs_left_alone(training: bool) -> None:
    args = arguments(shape=(2, 4, 9, 8), dtype=torch.float32)
    expected = dwconv_bn_silu(**{k: v.clone() for k, v in args.items()}, training=training)
    for x in (
        args["x"].to(memory_format=torch.channels_last),
        args["x"].transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([args["x"], args["x"]], 1)[:, :4],
    ):
        before = x.clone()
        copies = {k: v.clone() for k, v in args.items()} | {"x": x}
        y = dwconv_bn_silu(**copies, training=training)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(x, before)


def test_empty_batch() -> None:
    args = arguments(shape=(0, 3, 7, 6))
    mean = args["running_mean"].clone()
    for training in (False, True):
        assert dwconv_bn_silu(**args, stride=2, training=training).shape == (0, 3, 4, 3)
    assert torch.equal(args["running_mean"], mean)


def test_nan_and_inf_propagate() -> None:
    args = arguments()
    args["x"][0, 0, 2, 3] = float("nan")
    args["x"][1, 1, 0, 0] = float("inf")
    expected, _ = by_modules(args, 1, None, training=False)
    torch.testing.assert_close(dwconv_bn_silu(**args), expected, equal_nan=True)
    assert expected.isnan().any()


BAD = {
    # name: (changes to the arguments, error, words of its text)
    "x_not_a_tensor": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x_integer": ({"x": torch.ones(2, 3, 7, 6).int()}, TypeError, "x must have a floating dtype"),
    "x_three_dimensions": ({"x": torch.ones(3, 7, 6)}, ValueError, r"x must be \[N,C,H,W\]"),
    "weight_channels": ({"weight": torch.ones(4, 1, 3, 3)}, ValueError, r"C = 3.*\[4, 1, 3, 3\]"),
    "weight_not_depthwise": ({"weight": torch.ones(3, 3, 3, 3)}, ValueError, r"\[C,1,K,K\]"),
    "weight_oblong": ({"weight": torch.ones(3, 1, 3, 5)}, ValueError, r"\[C,1,K,K\]"),
    "weight_two_dimensions": ({"weight": torch.ones(3, 9)}, ValueError, r"\[C,1,K,K\]"),
    "bn_weight_size": ({"bn_weight": torch.ones(2)}, ValueError, r"bn_weight .*\[3\], got \[2\]"),
    "bn_bias_type": ({"bn_bias": 0.0}, TypeError, "bn_bias must be a tensor, got float"),
    "running_var_device": (
        {"running_var": torch.ones(3, device="meta")},
        ValueError,
        "running_var must be on the device of x, cpu, got meta",
    ),
    "running_mean_alone": ({"running_var": None}, ValueError, "must both be"),
    "no_statistics_in_eval": (
        {"running_mean": None, "running_var": None},
        ValueError,
        "None only with training=True",
    ),
    "stride_0": ({"stride": 0}, ValueError, "stride must be .*got 0"),
    "stride_pair": ({"stride": (1, 1)}, ValueError, r"stride must be .*got \(1, 1\)"),
    "padding_negative": ({"padding": -1}, ValueError, "padding must be"),
    "padding_pair": ({"padding": (1, 1)}, ValueError, r"padding must be .*got \(1, 1\)"),
    "padding_word": ({"padding": "same"}, TypeError, "padding must be .*got 'same'"),
    "padding_float": ({"padding": (1, 1, 1, 0.5)}, TypeError, "padding must be"),
    "input_smaller_than_kernel": (
        {"x": torch.ones(2, 3, 2, 2).double(), "padding": 0},
        ValueError,
        r"\[2, 2\] is smaller than the 3x3 kernel",
    ),
    "one_value_per_channel": (
        {"x": torch.ones(1, 3, 1, 1).double(), "training": True},
        ValueError,
        "more than 1 value per channel",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name: str) -> None:
    changes, error, words = BAD[name]
    with pytest.raises(error, match=words):
        dwconv_bn_silu(**{**arguments(), **changes})
