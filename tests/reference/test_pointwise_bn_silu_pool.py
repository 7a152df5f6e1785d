"""reference.pointwise_bn_silu_pool against nn modules and autograd, and the algebra beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference_passes
from activated import SPREAD
from effnet_fast.ops.pointwise_bn_silu_pool import backward_sums
from effnet_fast.reference import pointwise_bn_silu_pool
from effnet_fast.reference.activations import ACTIVATIONS
from reference_passes import pooled_backward as backward

MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def arguments(shape: tuple[int, ...] = (2, 3, 4, 5), out: int = 4) -> dict[str, Any]:
    double = {"dtype": torch.float64}
    return {
        "x": torch.randn(shape, **double),
        "weight": torch.randn(out, shape[1], 1, 1, **double),
        "bn_weight": torch.rand(out, **double) + 0.5,
        "bn_bias": torch.randn(out, **double),
        "running_mean": torch.randn(out, **double),
        "running_var": torch.rand(out, **double) + 0.5,
    }


@MODES
def test_agrees_with_modules(training: bool) -> None:
    args = arguments()
    conv, norm = nn.Conv2d(3, 4, 1, bias=False).double(), nn.BatchNorm2d(4).double()
    norm.train(training)
    conv.weight.data.copy_(args["weight"])
    names = {"weight": "bn_weight", "bias": "bn_bias"}
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(norm, name).data.copy_(args[names.get(name, name)])
    stock = nn.Sequential(conv, norm, nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.testing.assert_close(pointwise_bn_silu_pool(**args, training=training), stock(args["x"]))
    torch.testing.assert_close(args["running_mean"], norm.running_mean)
    torch.testing.assert_close(args["running_var"], norm.running_var)


@MODES
def test_gradcheck(training: bool) -> None:
    *leaves, mean, var = arguments(shape=(2, 2, 3, 2), out=3).values()

    def function(*tensors: Tensor) -> Tensor:
        return pointwise_bn_silu_pool(*tensors, mean.clone(), var.clone(), training=training)

    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@MODES
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "plain"])
def test_backward_from_what_is_kept(activation: str, training: bool) -> None:
    """z, norm and two sums per image and channel give every gradient that autograd gives."""
    args = arguments(shape=(3, 5, 4, 3))
    if activation == "plain":
        activation = "silu"
        args |= {"bn_weight": None, "bn_bias": None}
    else:
        args["bn_weight"] = args["bn_weight"] * SPREAD.get(activation, 1.0)
    names = [k for k in ("x", "weight", "bn_weight", "bn_bias") if args[k] is not None]
    leaves = {k: args[k].clone().requires_grad_() for k in names}
    y = pointwise_bn_silu_pool(**args | leaves, training=training, activation=activation)
    grad_y = torch.randn_like(y)
    exact = dict(zip(names, torch.autograd.grad(y, list(leaves.values()), grad_y), strict=True))

    args = args | {"running_mean": None, "running_var": None} if training else args
    z, norm = reference_passes.expand(*args.values(), 1e-5)
    pooled, slopes = reference_passes.squeeze(z, norm, activation)
    q = grad_y / 12
    sums = backward_sums(q, slopes)
    given = (z, norm, sums if training else None, args["x"], args["weight"])
    grad_x, grad_weight = backward(q, *given, [True, True], activation)
    actual = {"x": grad_x, "weight": grad_weight, "bn_weight": sums[1], "bn_bias": sums[0]}
    torch.testing.assert_close(pooled, y.detach(), rtol=1e-13, atol=1e-13)
    for name, grad in exact.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-12, atol=1e-12)
    one = backward(q, *given, [True, False], activation)
    other = backward(q, *given, [False, True], activation)
    assert torch.equal(one[0], grad_x)
    assert torch.equal(other[1], grad_weight)
    assert one[1].numel() == other[0].numel() == 0


def test_no_pixels() -> None:
    args = arguments() | {"x": torch.randn(2, 3, 0, 5).double()}
    with pytest.raises(ValueError, match=r"H and W of at least 1, got \[2, 3, 0, 5\]"):
        pointwise_bn_silu_pool(**args)
