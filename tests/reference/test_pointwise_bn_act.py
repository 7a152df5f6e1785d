"""reference.pointwise_bn_act against nn modules, finite differences and its own docstring."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effnet_fast.reference import pointwise_bn_act

OPTIONS = [
    pytest.param(act, gated, added, id=f"{act}{'_gate' * gated}{'_residual' * added}")
    for act, gated, added in itertools.product(["silu", None], [False, True], [False, True])
]


def arguments(
    shape: tuple[int, ...] = (2, 3, 4, 5), out: int = 4, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    return {
        "x": torch.randn(shape, dtype=dtype),
        "weight": torch.randn(out, shape[1], 1, 1, dtype=dtype),
        "bn_weight": torch.rand(out, dtype=dtype) + 0.5,
        "bn_bias": torch.randn(out, dtype=dtype),
        "running_mean": torch.randn(out, dtype=dtype),
        "running_var": torch.rand(out, dtype=dtype) + 0.5,
    }


def extras(args: dict[str, Any], gated: bool, added: bool) -> dict[str, Tensor | None]:
    """The gate and residual that fit the arguments, where wanted."""
    n, c, h, w = args["x"].shape
    out, dtype = args["weight"].shape[0], args["x"].dtype
    return {
        "gate": torch.rand(n, c, 1, 1, dtype=dtype) if gated else None,
        "residual": torch.randn(n, out, h, w, dtype=dtype) if added else None,
    }


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("act", "gated", "added"), OPTIONS)
class TestOptions:
    def test_agrees_with_modules(
        self, act: str | None, gated: bool, added: bool, training: bool
    ) -> None:
        args = arguments()
        more = extras(args, gated, added)
        conv = nn.Conv2d(3, 4, 1, bias=False).double()
        norm = nn.BatchNorm2d(4).double().train(training)
        conv.weight.data.copy_(args["weight"])
        names = {"weight": "bn_weight", "bias": "bn_bias"}
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name).data.copy_(args[names.get(name, name)])
        expected = args["x"] if more["gate"] is None else args["x"] * more["gate"]
        expected = norm(conv(expected))
        expected = nn.SiLU()(expected) if act else expected
        expected = expected if more["residual"] is None else expected + more["residual"]

        y = pointwise_bn_act(**args, **more, act=act, training=training)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(args["running_mean"], norm.running_mean)
        torch.testing.assert_close(args["running_var"], norm.running_var)

    def test_gradcheck(self, act: str | None, gated: bool, added: bool, training: bool) -> None:
        args = arguments(shape=(2, 2, 3, 2), out=3)
        more = {k: v for k, v in extras(args, gated, added).items() if v is not None}
        statistics = args.pop("running_mean"), args.pop("running_var")

        def function(
            x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, *rest: Tensor
        ) -> Tensor:
            mean, var = (s.clone() for s in statistics)
            options = dict(zip(more, rest, strict=True))
            return pointwise_bn_act(
                x, weight, gamma, beta, mean, var, act=act, training=training, **options
            )

        inputs = [tensor.requires_grad_() for tensor in (*args.values(), *more.values())]
        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradgradcheck(training: bool) -> None:
    args = arguments(shape=(2, 2, 2, 2), out=2)
    mean, var = args.pop("running_mean"), args.pop("running_var")
    inputs = tuple(tensor.requires_grad_() for tensor in args.values())
    assert torch.autograd.gradgradcheck(
        lambda *tensors: pointwise_bn_act(*tensors, mean.clone(), var.clone(), training=training),
        inputs,
    )


def test_running_statistics_by_hand() -> None:
    args = arguments()
    mean, var = args["running_mean"].clone(), args["running_var"].clone()
    pointwise_bn_act(**args, training=True, momentum=0.25)
    z = torch.einsum("nchw,oc->onhw", args["x"], args["weight"][:, :, 0, 0]).flatten(1)
    torch.testing.assert_close(args["running_mean"], 0.75 * mean + 0.25 * z.mean(1))
    torch.testing.assert_close(args["running_var"], 0.75 * var + 0.25 * z.var(1, correction=1))


def test_absent_vectors() -> None:
    args = arguments()
    args["bn_weight"].fill_(1)
    args["bn_bias"].fill_(0)
    expected = pointwise_bn_act(**args, training=True)
    args |= dict.fromkeys(["bn_weight", "bn_bias", "running_mean", "running_var"])
    torch.testing.assert_close(pointwise_bn_act(**args, training=True), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_half_precision_beside_float_parameters(dtype: torch.dtype, training: bool) -> None:
    exact = arguments(dtype=torch.float32)
    more = extras(exact, gated=True, added=True)
    y = pointwise_bn_act(**{k: v.clone() for k, v in exact.items()}, **more, training=training)
    args = {k: v.clone() for k, v in exact.items()} | {"x": exact["x"].to(dtype)}
    inputs = [args[k].requires_grad_() for k in ("x", "weight", "bn_weight", "bn_bias")]
    actual = pointwise_bn_act(**args, **more, training=training)
    assert actual.dtype is dtype
    torch.testing.assert_close(actual.float(), y, rtol=0.1, atol=0.1)
    actual.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype is tensor.dtype for tensor in inputs)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_inputs_left_alone(training: bool) -> None:
    args = arguments(shape=(2, 4, 3, 3))
    more = extras(args, gated=True, added=True)
    before = {k: v.clone() for k, v in (args | more).items() if not k.startswith("running")}
    y = pointwise_bn_act(**args, **more, training=training)
    for name, tensor in before.items():
        assert torch.equal((args | more)[name], tensor), name
    pointers = {v.untyped_storage().data_ptr() for v in (args | more).values()}
    assert y.untyped_storage().data_ptr() not in pointers


def test_empty_batch() -> None:
    args = arguments(shape=(0, 3, 4, 5))
    for training in (False, True):
        assert pointwise_bn_act(**args, training=training).shape == (0, 4, 4, 5)


BAD = {
    # name: (changes to the arguments, error, words of its text)
    "x_not_a_tensor": ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
    "x_two_dimensions": ({"x": torch.ones(2, 3)}, ValueError, r"x must be \[N,C,H,W\]"),
    "weight_channels": ({"weight": torch.ones(4, 2, 1, 1)}, ValueError, r"Cin = 3.*\[4, 2, 1, 1\]"),
    "weight_3x3": ({"weight": torch.ones(4, 3, 3, 3)}, ValueError, r"\[Cout,Cin,1,1\]"),
    "weight_integer": ({"weight": torch.ones(4, 3, 1, 1).long()}, TypeError, "floating dtype"),
    "bn_bias_size": ({"bn_bias": torch.ones(3)}, ValueError, r"bn_bias .*\[4\], got \[3\]"),
    "act": ({"act": "tanh"}, ValueError, "act must be one of silu, identity, .*got 'tanh'"),
    "activation": ({"activation": "gelu"}, ValueError, "activation must be one of .*got 'gelu'"),
    "silu": ({"act": "silu", "activation": "relu"}, ValueError, "act is 'silu' and activation is"),
    "both": ({"act": None, "activation": "relu"}, ValueError, "act is None and activation is 'rel"),
    "gate_shape": ({"gate": torch.ones(2, 3)}, ValueError, r"gate .*\[2, 3, 1, 1\], got \[2, 3\]"),
    "gate_type": ({"gate": 0.5}, TypeError, "gate must be a tensor, got float"),
    "residual_shape": (
        {"residual": torch.ones(2, 3, 4, 5)},
        ValueError,
        r"residual .*\[2, 4, 4, 5\], got \[2, 3, 4, 5\]",
    ),
    "residual_device": (
        {"residual": torch.ones(2, 4, 4, 5, device="meta")},
        ValueError,
        "residual must be on the device of x",
    ),
    "no_statistics_in_eval": (
        {"running_mean": None, "running_var": None},
        ValueError,
        "None only with training=True",
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
        pointwise_bn_act(**{**arguments(), **changes})
