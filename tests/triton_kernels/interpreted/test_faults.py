"""Planted faults: what the parity tests must notice in the kernels."""

from __future__ import annotations

import importlib

import pytest
import triton
import triton.language as tl

from cases import MBCONV_CASES, find
from effnet_fast.ops.mbconv import mbconv
from effnet_fast.triton_kernels import folds
from mbconv_blocks import BlockCall, block_call, run
from parity import FP32, assert_parity


def check(call: BlockCall) -> None:
    actual = run(call, mbconv, backend="triton")
    stock, exact = (run(call, double=double) for double in (False, True))
    assert_parity(actual, stock, exact, call.x.dtype)


@triton.jit
def relu(u, lo, hi, ACT: tl.constexpr):
    return tl.maximum(u, 0.0)


@triton.jit
def sigmoid_only(grad, u, lo, hi, ACT: tl.constexpr):
    return grad / (1.0 + tl.exp(-u))


@triton.jit
def open_clamp(u, lo, hi):
    return u


@triton.jit
def slope_of_one(u, lo, hi, ACT: tl.constexpr):
    return u * 0.0 + 1.0


@triton.jit
def all_of_it(grad, u, lo, hi, ACT: tl.constexpr):
    return grad


@triton.jit
def half_gate_gradient(grad, gate, GATE: tl.constexpr):
    return grad * (1.0 / 6.0)


@triton.jit
def first_image(first, row, pixels):
    return first // pixels + row * 0


@triton.jit
def without_deviation(z, mask, count):
    mean = tl.sum(tl.where(mask, z, 0.0), 0) / tl.maximum(count, 1.0)
    return mean, tl.sum(tl.where(mask, z * z, 0.0), 0), mean * 0.0


@triton.jit
def without_means(
    grad, q, z, norm, sums, inverse, row_scale, lo, hi, first, pixels, at, c, image, inside, c_in,
    channels, ACT: tl.constexpr,
):  # fmt: skip
    du = tl.load(grad + first * channels + at, mask=inside, other=0.0).to(tl.float32)
    return du * tl.load(norm + c, mask=c_in, other=0.0)[None, :]


FAULTS = (
    ("pointwise_bn_act", "activated", relu),
    ("dwconv_bn_silu", "activated", relu),
    ("dwconv_backward", "activated", relu),
    ("dwconv_backward", "grad_through", sigmoid_only),
    ("bn_act", "grad_through", sigmoid_only),
    ("bn_act", "image_of", first_image),
    ("pointwise_bn_act", "image_of", first_image),
    ("pointwise_backward", "image_of", first_image),
    ("pointwise_backward", "load_dz", without_means),
    ("pointwise_bn_act", "tile_statistics", without_deviation),
    ("squeeze_excite", "activated", relu),
    ("squeeze_excite", "grad_through", sigmoid_only),
)
# The same with ReLU6 and a hard sigmoid in the place of SiLU and sigmoid.
CLAMP_FAULTS = (
    ("elementwise", "clamp", open_clamp),
    ("dwconv_backward", "grad_through", all_of_it),
    ("bn_act", "grad_through", all_of_it),
    ("elementwise", "activation_slope", slope_of_one),
    ("squeeze_excite", "grad_through_gate", half_gate_gradient),
)
CLAMPED = {"activation": "relu6", "se_activation": "relu6", "gate": "hardsigmoid"}


@pytest.mark.parametrize(
    ("module", "name", "fault", "kinds"),
    [
        *(pytest.param(*row, {}, id=f"{row[0]}-{row[1]}") for row in FAULTS),
        *(pytest.param(*row, CLAMPED, id=f"{row[0]}-{row[1]}-relu6") for row in CLAMP_FAULTS),
    ],
)
def test_a_wrong_function_is_noticed(
    module: str, name: str, fault: object, kinds: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        importlib.import_module(f"effnet_fast.triton_kernels.{module}"), name, fault
    )
    with pytest.raises(AssertionError):
        check(block_call(find(MBCONV_CASES, "c_odd_k3_stride_2"), FP32, dropped=True, **kinds))


@pytest.mark.exhaustive
def test_a_lost_part_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folds that stop one part early."""
    monkeypatch.setattr(folds, "_runs", lambda parts: (max(1, parts - 1), 1))
    with pytest.raises(AssertionError):
        check(block_call(find(MBCONV_CASES, "c_eq_vector"), FP32))
