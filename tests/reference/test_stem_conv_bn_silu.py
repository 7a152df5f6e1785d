"""reference.stem_conv_bn_silu against nn modules and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effnet_fast.reference import stem_conv_bn_silu

GEOMETRIES = {
    # name: (kernel, stride, padding)
    "k3_stride_2": (3, 2, None),
    "k5": (5, 1, None),
    "k1": (1, 2, None),
    "int_padding": (3, 1, 2),
    "same_k3": (3, 2, (0, 1, 0, 1)),
    "four_sides": (3, 3, (0, 3, 2, 1)),
}
MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def arguments(kernel: int, shape: tuple[int, ...] = (2, 3, 7, 6)) -> dict[str, Any]:
    x = torch.randn(shape, dtype=torch.float64)
    vectors = torch.rand(4, 4, dtype=torch.float64) + 0.5
    names = ("bn_weight", "bn_bias", "running_mean", "running_var")
    weight = torch.randn(4, shape[1], kernel, kernel, dtype=torch.float64)
    return {"x": x, "weight": weight, **dict(zip(names, vectors.clone(), strict=True))}


@MODES
@pytest.mark.parametrize("name", GEOMETRIES)
def test_agrees_with_modules(name: str, training: bool) -> None:
    kernel, stride, padding = GEOMETRIES[name]
    args = arguments(kernel)
    sides = (kernel - 1) // 2 if padding is None else padding
    conv, norm = nn.Conv2d(3, 4, kernel, stride, bias=False), nn.BatchNorm2d(4)
    net = nn.Sequential(nn.ZeroPad2d(sides), conv, norm, nn.SiLU()).double().train(training)
    with torch.no_grad():
        conv.weight.copy_(args["weight"])
        for key in ("weight", "bias"):
            getattr(norm, key).copy_(args[f"bn_{key}"])
        for key in ("running_mean", "running_var"):
            getattr(norm, key).copy_(args[key])
        expected = net(args["x"])
    y = stem_conv_bn_silu(**args, stride=stride, padding=padding, training=training)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(args["running_mean"], norm.running_mean)
    torch.testing.assert_close(args["running_var"], norm.running_var)


@pytest.mark.slow
@MODES
@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradcheck(name: str, training: bool) -> None:
    kernel, stride, padding = GEOMETRIES[name]
    args = arguments(kernel, shape=(2, 2, 5, 4))
    mean, var = args.pop("running_mean"), args.pop("running_var")

    def function(*tensors: Tensor) -> Tensor:
        options = {"stride": stride, "padding": padding, "training": training}
        return stem_conv_bn_silu(*tensors, mean.clone(), var.clone(), **options)

    inputs = tuple(tensor.requires_grad_() for tensor in args.values())
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"weight": torch.zeros(4, 2, 3, 3)}, ValueError, r"Cin = 3 as in x, got \[4, 2, 3, 3\]"),
        ({"weight": torch.zeros(4, 3, 3)}, ValueError, r"got \[4, 3, 3\]"),
        ({"x": torch.zeros(3, 7, 6)}, ValueError, "3 dimensions"),
        ({"x": torch.zeros(2, 3, 7, 6, dtype=torch.int64)}, TypeError, r"got torch\.int64"),
        ({"stride": 0}, ValueError, "at least 1, got 0"),
        ({"padding": (1, 2)}, ValueError, "left, right, top, bottom"),
        ({"padding": 0, "x": torch.zeros(2, 3, 2, 6)}, ValueError, "smaller than the 3x3 kernel"),
        ({"running_mean": None, "running_var": None}, ValueError, "only with training=True"),
    ],
)
def test_bad_arguments(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        stem_conv_bn_silu(**arguments(3) | changed)
