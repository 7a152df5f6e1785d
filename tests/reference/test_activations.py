"""The table of activations and gates: values and what kernels are told, against PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effnet_fast import reference
from effnet_fast.reference.activations import (
    ACTIVATIONS,
    GATES,
    activate,
    check_activation,
    check_gate,
    gate_of,
    kernel_activation,
    kernel_gate,
)

MODULES: dict[str, nn.Module] = {
    "silu": nn.SiLU(), "identity": nn.Identity(), "relu": nn.ReLU(), "relu6": nn.ReLU6(),
    "hardswish": nn.Hardswish(), "sigmoid": nn.Sigmoid(), "hardsigmoid": nn.Hardsigmoid(),
}  # fmt: skip
INF, NAN = math.inf, math.nan
BOUNDS = (0.0, -0.0, 6.0, 3.0, -3.0)


def values(dtype: torch.dtype = torch.float64) -> Tensor:
    """Each bound, its two neighbours, what is far away, and what is no number."""
    bounds = torch.tensor(BOUNDS, dtype=dtype)
    far = torch.tensor([INF, -INF, NAN, 1e4, -1e4, 0.5, -0.5], dtype=dtype)
    around = [torch.nextafter(bounds, torch.full_like(bounds, side)) for side in (INF, -INF)]
    return torch.cat([bounds, *around, far, torch.linspace(-8, 8, 65, dtype=dtype)])


def test_the_names() -> None:
    assert ACTIVATIONS == ("silu", "identity", "relu", "relu6", "hardswish")
    assert GATES == ("sigmoid", "hardsigmoid")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_the_modules(name: str, dtype: torch.dtype) -> None:
    x = values(dtype)
    y, expected = activate(x, name), MODULES[name](x)
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(y.signbit() & ~y.isnan(), expected.signbit() & ~expected.isnan())


@pytest.mark.parametrize("name", GATES)
def test_gates_are_the_modules(name: str) -> None:
    assert torch.equal(
        gate_of(values(), name).nan_to_num(7.0), MODULES[name](values()).nan_to_num(7.0)
    )


def in_kernels_words(u: float, kind: int, lo: float, hi: float) -> tuple[float, float]:
    """Value and slope of a clamp as kernels compute them."""
    assert kind == 1
    value = lo if u < lo else u
    value = hi if value > hi else value
    return value, 0.0 if u <= lo or u >= hi else 1.0


@pytest.mark.parametrize("name", ["identity", "relu", "relu6"])
def test_clamps_in_kernels_words(name: str) -> None:
    """NaN stays NaN; a bound that is NaN bounds nothing; on a bound the slope is 0.

    The slope at NaN is 1 in kernels, and 0 or 1 in PyTorch's hardtanh, as its vectors fall.
    """
    x = values().requires_grad_()
    y = MODULES[name](x)
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(x))
    for u, value, expected in zip(x.tolist(), y.tolist(), slope.tolist(), strict=True):
        ours = in_kernels_words(u, *kernel_activation(name))
        assert ours[0] == value or (math.isnan(ours[0]) and math.isnan(value))
        assert ours[1] == expected or math.isnan(u), u
    assert in_kernels_words(NAN, *kernel_activation(name))[1] == 1.0


def test_kinds_of_kernels() -> None:
    kinds = [kernel_activation(name)[0] for name in ACTIVATIONS]
    assert kinds == [0, 1, 1, 1, 2]
    assert [kernel_gate(name) for name in GATES] == [0, 1]


UNKNOWN: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (check_activation, ("activation",)), (check_gate, ("gate",)), (kernel_activation, ()),
    (kernel_gate, ()),
]  # fmt: skip


@pytest.mark.parametrize(("check", "args"), UNKNOWN)
@pytest.mark.parametrize("value", ["tanh", "", "SILU", None, 0, math])
def test_an_unknown_name_is_refused(check: Any, args: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(ValueError, match=r"must be one of (silu, identity|sigmoid, hardsigmoid)"):
        check(*args, value)


def layer(channels: int, *shape: int) -> dict[str, Tensor]:
    double = {"dtype": torch.float64}
    return {
        "weight": torch.randn(shape, **double), "bn_weight": 3 * torch.rand(channels, **double) + 1,
        "bn_bias": torch.randn(channels, **double), "running_mean": torch.zeros(channels, **double),
        "running_var": torch.ones(channels, **double),
    }  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_ops_are_convolution_norm_and_module(name: str, training: bool) -> None:
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    cases = {
        "dwconv_bn_silu": (layer(4, 4, 1, 3, 3), {"padding": 1, "groups": 4}),
        "stem_conv_bn_silu": (layer(5, 5, 4, 3, 3), {"padding": 1, "stride": 2}),
        "pointwise_bn_act": (layer(5, 5, 4, 1, 1), {}),
        "pointwise_bn_silu_pool": (layer(5, 5, 4, 1, 1), {}),
    }
    for op, (tensors, geometry) in cases.items():
        z = nn.functional.conv2d(x, tensors["weight"], **geometry)
        names = ("running_mean", "running_var", "bn_weight", "bn_bias")
        u = nn.functional.batch_norm(z, *(tensors[n].clone() for n in names), training=training)
        expected = MODULES[name](u)
        if op == "pointwise_bn_silu_pool":
            expected = expected.mean((2, 3))
        y = getattr(reference, op)(x, **tensors, training=training, activation=name)
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_squeeze_excite_is_its_modules(name: str, gate: str) -> None:
    x, double = torch.randn(2, 4, 5, 6, dtype=torch.float64), {"dtype": torch.float64}
    w1, b1 = 4 * torch.randn(3, 4, **double), torch.randn(3, **double)
    w2, b2 = 4 * torch.randn(4, 3, **double), torch.randn(4, **double)
    hidden = MODULES[name](nn.functional.linear(x.mean((2, 3)), w1, b1))
    factor = MODULES[gate](nn.functional.linear(hidden, w2, b2))
    y = reference.squeeze_excite(x, w1, b1, w2, b2, activation=name, gate=gate)
    torch.testing.assert_close(y, x * factor[..., None, None])
