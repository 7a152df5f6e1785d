"""The other ops of inference and of squeeze-and-excite, interpreted, against their references."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from cases import (
    HEAD_CASES,
    MBCONV_CASES,
    POINTWISE_CASES,
    SQUEEZE_EXCITE_CASES,
    MBConvCase,
    find,
)
from effnet_fast.ops.mbconv import eval_op as mbconv_eval
from parity import (
    FP32,
    MODES,
    Dtypes,
    assert_parity,
    assert_same,
    check,
    head_call,
    pointwise_call,
    run,
    squeeze_excite_call,
)
from tiers import some

FP16 = Dtypes(torch.float16, torch.float16)
MIXED = Dtypes(torch.float16, torch.float32)
DTYPES = pytest.mark.parametrize("dtypes", some((FP32, FP16, MIXED), (FP32, FP16)))


def by_hand(params: list, *kept: str) -> list[Any]:
    """Names of the cases that are no network's own, all but those kept for `make test-all`."""
    return some([p.id for p in params if not p.id.startswith("b0")], kept)


@DTYPES
@pytest.mark.parametrize(
    "name", by_hand(POINTWISE_CASES, "c_odd", "out_odd", "gate_residual_no_act", "batch_0")
)
def test_pointwise(name: str, dtypes: Dtypes) -> None:
    check(pointwise_call(find(POINTWISE_CASES, name), dtypes), "triton", wanted=())


@pytest.mark.exhaustive
def test_pointwise_of_several_tiles() -> None:
    """More rows, outputs and inputs than a tile holds, none of them a multiple."""
    case = replace(find(POINTWISE_CASES, "gate_residual_no_act"), c=100, out=150, h=11, w=13)
    check(pointwise_call(case), "triton", wanted=())


def test_pointwise_of_strided_input() -> None:
    call = pointwise_call(find(POINTWISE_CASES, "gate_residual_no_act"))
    n, c, h, w = call.x.shape
    larger = torch.randn(n, c, h + 1, w + 2).contiguous(memory_format=torch.channels_last)
    check(call.with_tensors(x=larger[:, :, 1:, 1 : w + 1]), "triton", wanted=())


@DTYPES
@pytest.mark.parametrize("name", by_hand(SQUEEZE_EXCITE_CASES, "c_odd", "batch_0"))
def test_squeeze_excite(name: str, dtypes: Dtypes) -> None:
    check(squeeze_excite_call(find(SQUEEZE_EXCITE_CASES, name), dtypes), "triton")


def test_squeeze_excite_without_biases_is_deterministic() -> None:
    call = squeeze_excite_call(find(SQUEEZE_EXCITE_CASES, "c_odd"))
    call = call.with_tensors(reduce_bias=None, expand_bias=None)
    assert_same(check(call, "triton"), run(call, "triton"))


@DTYPES
@pytest.mark.parametrize("name", by_hand(MBCONV_CASES, "c_odd_k3_stride_2", "no_expansion"))
def test_mbconv_eval(name: str, dtypes: Dtypes) -> None:
    """The inference op of a block."""
    from mbconv_blocks import EPS, block_call, params_of
    from mbconv_blocks import run as run_block

    case: MBConvCase = find(MBCONV_CASES, name)
    call = block_call(case, dtypes, False)
    params = params_of(call.tensors)
    padding = ((case.k - 1) // 2,) * 4
    layers = (params.expand or [], params.depthwise, params.squeeze, params.project)
    kinds = ("silu", "silu", "sigmoid")
    y = mbconv_eval(call.x, *layers, case.stride, padding, EPS, case.residual, *kinds, "triton")
    stock, exact = (run_block(call, wanted=(), double=double)["y"] for double in (False, True))
    assert_parity({"y": y}, {"y": stock}, {"y": exact}, dtypes.x)


@DTYPES
@MODES
@pytest.mark.parametrize("name", by_hand(HEAD_CASES, "c_odd"))
def test_head(name: str, training: bool, dtypes: Dtypes) -> None:
    """Tiles that cross images, and images of more than one tile; with gradients and without."""
    call = head_call(find(HEAD_CASES, name), dtypes, training)
    check(call, "triton")
    check(call, "triton", wanted=())


@pytest.mark.exhaustive
def test_head_of_one_gradient_at_a_time() -> None:
    call = head_call(find(HEAD_CASES, "c_odd"), training=True)
    full = run(call, "triton")
    for wanted in call.differentiable:
        assert_same(run(call, "triton", wanted=[wanted]), full)


@pytest.mark.parametrize(
    ("module", "name"),
    [("pointwise_backward", "activation_slope"), ("pointwise_backward", "image_of")],
)
def test_a_wrong_function_in_the_head_is_noticed(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = {"activation_slope": sigmoid_only, "image_of": first_image}
    owner = importlib.import_module(f"effnet_fast.triton_kernels.{module}")
    monkeypatch.setattr(owner, name, faults[name])
    with pytest.raises(AssertionError, match="grad x"):
        check(head_call(find(HEAD_CASES, "c_odd"), training=True), "triton")


@triton.jit
def sigmoid_only(u, lo, hi, ACT: tl.constexpr):
    return 1.0 / (1.0 + tl.exp(-u))


@triton.jit
def first_image(first, row, pixels):
    return first // pixels + row * 0
