"""Clamps and hard gates on interpreted Triton kernels, and blocks without squeeze-excite."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from activated import slope_of
from bounds import draws
from cases import MBCONV_CASES, find
from effnet_fast import ops
from effnet_fast.ops.mbconv import mbconv
from effnet_fast.reference.activations import ACTIVATIONS, activate
from effnet_fast.triton_kernels.elementwise import (
    activated,
    activated_with_slope,
    activation_slope,
    gate_of,
    grad_through,
    grad_through_gate,
)
from effnet_fast.triton_kernels.launching import activation_constants
from mbconv_blocks import BlockCall, block_call, run
from packed_blocks import FUSED, KINDS, LITE, MOBILE, check_packed, check_packed_fused
from parity import FP16, FP32, MODES, SAMPLES, Dtypes, assert_parity, check, sample, with_gradients
from tiers import some

INF, NAN = math.inf, math.nan
KNOWN = [name for name in ACTIVATIONS if name != "hardswish"]
# The bounds and their neighbours, both zeros, and what is no number.
VALUES = [
    x for b in (0.0, 6.0, 3.0, -3.0) for x in (b, math.nextafter(b, 9), math.nextafter(b, -9))
]
VALUES += [
    -0.0,
    1e-30,
    -1e-30,
    5.999999,
    6.000001,
    -3.000001,
    2.999999,
    INF,
    -INF,
    NAN,
    100.0,
    -9.0,
]
BLOCKS = [
    LITE,
    MOBILE,
    {"activation": "silu", "squeeze": False},
    {"activation": "identity", "se_activation": "relu6"},
    {"activation": "relu6", "se_activation": "identity", "gate": "hardsigmoid"},
]


@triton.jit
def apply_kernel(x, y, lo, hi, SIZE: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr):
    """y [7,SIZE]: act, its slope, both again, and what of a gradient of 1 goes through it.

    Then the gate, and what of a gradient of 1 goes through a gate of x.
    """
    at = tl.arange(0, SIZE)
    u = tl.load(x + at)
    tl.store(y + at, activated(u, lo, hi, ACT))
    tl.store(y + SIZE + at, activation_slope(u, lo, hi, ACT))
    value, slope = activated_with_slope(u, lo, hi, ACT)
    tl.store(y + 2 * SIZE + at, value)
    tl.store(y + 3 * SIZE + at, slope)
    one = tl.full([SIZE], 1.0, tl.float32)
    tl.store(y + 4 * SIZE + at, grad_through(one, u, lo, hi, ACT))
    tl.store(y + 5 * SIZE + at, gate_of(u, GATE))
    tl.store(y + 6 * SIZE + at, grad_through_gate(one, u, GATE))


def applied(activation: str, gate: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.tensor(VALUES + [0.5] * (32 - len(VALUES)))
    y = torch.empty(7, 32)
    act, bounds = activation_constants(activation)
    apply_kernel[1,](x, y, *bounds, SIZE=32, ACT=act, GATE=gate)
    return x, y


@pytest.mark.parametrize("activation", [name for name in KNOWN if name != "silu"])
def test_clamps_at_the_bounds(activation: str) -> None:
    """PyTorch's own values and slopes; NaN stays NaN.

    At NaN the slope is 1, where PyTorch's hardtanh has 0 or 1 as its vectors fall.
    """
    x, y = applied(activation, "sigmoid")
    slope = slope_of(x, activation)
    slope[x.isnan()] = 1.0
    for row, expected in zip(y, (*(activate(x, activation), slope) * 2, slope), strict=False):
        torch.testing.assert_close(row, expected, rtol=0, atol=0, equal_nan=True)


def test_the_hard_gate_at_the_bounds() -> None:
    x, y = applied("relu", "hardsigmoid")
    torch.testing.assert_close(y[5], F.hardsigmoid(x), equal_nan=True)
    assert torch.equal(y[5] == 1, x >= 3)
    assert torch.equal(y[5] == 0, x <= -3)
    inside = torch.where((x > 0) & (x < 1), 1.0 / 6.0, 0.0)
    torch.testing.assert_close(y[6], inside)


@pytest.mark.parametrize("dtypes", some((FP32, FP16), (FP32,)))
@pytest.mark.parametrize("activation", some(KNOWN[1:], ("relu6",)))
@pytest.mark.parametrize(
    "name", some((*SAMPLES, "head_eval"), {*SAMPLES, "head_eval"} - {"dwconv_eval"})
)
def test_ops(name: str, activation: str, dtypes: Dtypes) -> None:
    call = sample(name, dtypes)
    kinds = {"activation": activation}
    kinds |= {"gate": "hardsigmoid"} if call.op == "squeeze_excite" else {}
    given = call.activated(**kinds)
    check(given, "triton", wanted=with_gradients(call))
    if not call.options.get("training"):
        check(given, "triton", wanted=())


def check_block(call: BlockCall, **options: Any) -> None:
    actual = run(call, mbconv, backend="triton", **options)
    stock, exact = (run(call, double=double, **options) for double in (False, True))
    assert_parity(actual, stock, exact, call.x.dtype)


@MODES
@pytest.mark.parametrize("dtypes", some((FP32, FP16), (FP32,)))
@pytest.mark.parametrize("kinds", some(BLOCKS, (LITE, MOBILE)))
@pytest.mark.parametrize(
    "name",
    some(("c_odd_k3_stride_2", "c_odd_stride_2", "no_expansion_residual"), ("c_odd_k3_stride_2",)),
)
def test_blocks(name: str, kinds: dict[str, Any], dtypes: Dtypes, training: bool) -> None:
    case = find(MBCONV_CASES, name)

    def make(seed: int) -> BlockCall:
        return block_call(case, dtypes, training, dropped=training, seed=seed, **kinds)

    call = make(0)
    if dtypes is FP16 and training:
        (call,) = draws(make, functools.partial(run, double=True, wanted=()))
    check_block(call)
    if not training:
        check_block(call, wanted=())


@pytest.mark.parametrize("value", some((NAN, INF), (NAN,)))
def test_without_a_gate_a_nan_spreads_no_further_than_in_stock(value: float) -> None:
    call = block_call(find(MBCONV_CASES, "c_odd_k3_stride_2"), FP32, False, **LITE)
    x = call.x.clone(memory_format=torch.preserve_format)
    x[0, 1, 2, 2] = value
    given = call.with_tensors(x=x)
    actual, stock = run(given, mbconv, backend="triton", wanted=()), run(given, wanted=())
    assert torch.equal(actual["y"].isnan(), stock["y"].isnan())


def test_hardswish_is_refused() -> None:
    call = sample("stem_eval").with_options(activation="hardswish")
    with pytest.raises(RuntimeError, match="the activation is hardswish; the triton backend has"):
        ops.stem_conv_bn_silu(**call.tensors, **call.options, backend="triton")


@pytest.mark.parametrize("kinds", some(KINDS, (LITE, MOBILE)))
def test_packed_blocks(kinds: dict[str, Any]) -> None:
    for name in ("c_odd_stride_2", "no_expansion_residual"):
        check_packed(block_call(find(MBCONV_CASES, name), FP32, False, **kinds), "triton")


@pytest.mark.parametrize("name", some(FUSED, ("residual", "same_relu6", "no_project_residual")))
def test_packed_fused_blocks(name: str) -> None:
    check_packed_fused(name, torch.float32, "triton")
