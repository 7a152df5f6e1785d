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
def relu(u):
    return tl.maximum(u, 0.0)


@triton.jit
def sigmoid_only(u):
    return 1.0 / (1.0 + tl.exp(-u))


@triton.jit
def first_image(first, row, pixels):
    return first // pixels + row * 0


@triton.jit
def without_deviation(z, mask, count):
    mean = tl.sum(tl.where(mask, z, 0.0), 0) / tl.maximum(count, 1.0)
    return mean, tl.sum(tl.where(mask, z * z, 0.0), 0), mean * 0.0


@triton.jit
def without_means(
    grad, q, z, norm, sums, inverse, row_scale, first, pixels, at, c, image, inside, c_in, channels
):
    du = tl.load(grad + first * channels + at, mask=inside, other=0.0).to(tl.float32)
    return du * tl.load(norm + c, mask=c_in, other=0.0)[None, :]


FAULTS = (
    ("pointwise_bn_act", "silu", relu),
    ("dwconv_bn_silu", "silu", relu),
    ("dwconv_backward", "silu", relu),
    ("dwconv_backward", "silu_grad", sigmoid_only),
    ("bn_act", "silu_grad", sigmoid_only),
    ("bn_act", "image_of", first_image),
    ("pointwise_bn_act", "image_of", first_image),
    ("pointwise_backward", "image_of", first_image),
    ("pointwise_backward", "load_dz", without_means),
    ("pointwise_bn_act", "tile_statistics", without_deviation),
    ("squeeze_excite", "silu", relu),
    ("squeeze_excite", "silu_grad", sigmoid_only),
)


@pytest.mark.parametrize(
    ("module", "name", "fault"),
    [pytest.param(*row, id=f"{row[0]}-{row[1]}") for row in FAULTS],
)
def test_a_wrong_function_is_noticed(
    module: str, name: str, fault: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        importlib.import_module(f"effnet_fast.triton_kernels.{module}"), name, fault
    )
    with pytest.raises(AssertionError):
        check(block_call(find(MBCONV_CASES, "c_odd_k3_stride_2"), FP32, dropped=True))


@pytest.mark.exhaustive
def test_a_lost_part_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folds that stop one part early."""
    monkeypatch.setattr(folds, "_runs", lambda parts: (max(1, parts - 1), 1))
    with pytest.raises(AssertionError):
        check(block_call(find(MBCONV_CASES, "c_eq_vector"), FP32))
