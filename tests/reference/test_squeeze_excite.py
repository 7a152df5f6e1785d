"""reference.squeeze_excite against nn modules, finite differences and its own docstring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from effnet_fast.reference import squeeze_excite


def arguments(
    shape: tuple[int, ...] = (2, 6, 4, 5), reduced: int = 2, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    channels = shape[1]
    return {
        "x": torch.randn(shape, dtype=dtype),
        "reduce_weight": torch.randn(reduced, channels, 1, 1, dtype=dtype),
        "reduce_bias": torch.randn(reduced, dtype=dtype),
        "expand_weight": torch.randn(channels, reduced, 1, 1, dtype=dtype),
        "expand_bias": torch.randn(channels, dtype=dtype),
    }


@pytest.mark.parametrize(
    "shape", [(2, 6, 4, 5), (1, 1, 1, 1), (3, 17, 7, 7), (0, 4, 3, 3)], ids=str
)
def test_agrees_with_torchvision(shape: tuple[int, ...]) -> None:
    args = arguments(shape)
    module = SqueezeExcitation(shape[1], 2, activation=nn.SiLU).double()
    module.load_state_dict(
        {
            "fc1.weight": args["reduce_weight"],
            "fc1.bias": args["reduce_bias"],
            "fc2.weight": args["expand_weight"],
            "fc2.bias": args["expand_bias"],
        }
    )
    torch.testing.assert_close(squeeze_excite(**args), module(args["x"]))


def test_two_dimensional_weights_and_absent_biases() -> None:
    args = arguments()
    flat = args | {k: args[k].flatten(1) for k in ("reduce_weight", "expand_weight")}
    assert torch.equal(squeeze_excite(**flat), squeeze_excite(**args))
    for name in ("reduce_bias", "expand_bias"):
        zero = squeeze_excite(**args | {name: torch.zeros_like(args[name])})
        torch.testing.assert_close(squeeze_excite(**args | {name: None}), zero)


@pytest.mark.slow
@pytest.mark.parametrize("flat", [False, True])
def test_gradcheck(flat: bool) -> None:
    args = arguments(shape=(2, 3, 2, 3))
    inputs = [
        t.flatten(1) if flat and t.dim() == 4 and t is not args["x"] else t for t in args.values()
    ]
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(squeeze_excite, inputs)
    assert torch.autograd.gradgradcheck(squeeze_excite, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("same", [False, True])
def test_half_precision(dtype: torch.dtype, same: bool) -> None:
    exact = arguments(dtype=torch.float32)
    args = {k: v.to(dtype) if same or k == "x" else v.clone() for k, v in exact.items()}
    inputs = [tensor.requires_grad_() for tensor in args.values()]
    y = squeeze_excite(**args)
    assert y.dtype is dtype
    torch.testing.assert_close(y.float(), squeeze_excite(**exact), rtol=0.05, atol=0.05)
    y.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype is tensor.dtype for tensor in inputs)


def test_layouts_and_inputs_left_alone() -> None:
    args = arguments()
    expected = squeeze_excite(**args)
    before = args["x"].clone()
    strided: list[Tensor] = [
        args["x"].to(memory_format=torch.channels_last),
        torch.cat([args["x"]] * 2, 3)[..., :5],
    ]
    for x in strided:
        torch.testing.assert_close(squeeze_excite(**args | {"x": x}), expected)
        assert torch.equal(x, before)


BAD = {
    # name: (changes to the arguments, error, words of its text)
    "x_integer": ({"x": torch.ones(2, 6, 4, 5).int()}, TypeError, "x must have a floating dtype"),
    "x_three_dimensions": ({"x": torch.ones(6, 4, 5)}, ValueError, r"x must be \[N,C,H,W\]"),
    "x_empty_image": ({"x": torch.ones(2, 6, 0, 5)}, ValueError, "H and W of at least 1"),
    "reduce_channels": (
        {"reduce_weight": torch.ones(2, 5, 1, 1)},
        ValueError,
        r"reduce_weight .*\[2, 6, 1, 1\] or \[2, 6\], got \[2, 5, 1, 1\]",
    ),
    "reduce_vector": ({"reduce_weight": torch.ones(2)}, ValueError, r"\[R,C,1,1\] or \[R,C\]"),
    "reduce_nothing": ({"reduce_weight": torch.ones(0, 6)}, ValueError, "R >= 1"),
    "expand_transposed": (
        {"expand_weight": torch.ones(2, 6)},
        ValueError,
        r"expand_weight .*\[6, 2\], got \[2, 6\]",
    ),
    "reduce_bias_size": ({"reduce_bias": torch.ones(6)}, ValueError, r"reduce_bias .*\[2\]"),
    "expand_bias_type": ({"expand_bias": 1}, TypeError, "expand_bias must be a tensor, got int"),
    "device": (
        {"expand_bias": torch.ones(6, device="meta")},
        ValueError,
        "expand_bias must be on the device of x",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name: str) -> None:
    changes, error, words = BAD[name]
    with pytest.raises(error, match=words):
        squeeze_excite(**{**arguments(), **changes})
