"""The stem's kernels, interpreted, against the reference."""

from __future__ import annotations

import functools

import pytest
import torch
import triton
import triton.language as tl

from cases import STEM_CASES, StemCase, find
from effnet_fast import ops
from effnet_fast.triton_kernels import stem_conv_bn_silu as kernels
from parity import (
    FP16,
    FP32,
    MODES,
    Dtypes,
    assert_same,
    check,
    nchw_copy,
    run,
    stem_call,
)
from stems import check_oblong_stride
from tiers import some

case = functools.partial(find, STEM_CASES)
MIXED = Dtypes(torch.float16, torch.float32)
LARGE = ("b0", "h_gt_chunk", "w_gt_chain", "c_gt_chain")  # for an interpreter
KEPT = ("out_odd", "same_odd_rows", "stride_3_four_sides")
BY_HAND = [
    pytest.param(*p.values, id=p.id, marks=() if p.id in KEPT else pytest.mark.exhaustive)
    for p in STEM_CASES
    if p.id not in LARGE
]


@pytest.mark.parametrize("dtypes", some((FP32, FP16), (FP32,)))
@MODES
@pytest.mark.parametrize("case", BY_HAND)
def test_matches_reference(case: StemCase, training: bool, dtypes: Dtypes) -> None:
    call = stem_call(case, dtypes, training)
    check(call, "triton")
    if not training:
        y = check(call, "triton", wanted=())["y"]
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.exhaustive
@MODES
def test_several_runs_and_parts(training: bool, two_parts_a_run: list[int]) -> None:
    """More tiles than one fold takes, images that tiles cross."""
    call = stem_call(StemCase("drawn", 3, 3, 40, 20, 21), FP32, training)
    assert_same(check(call, "triton"), run(call, "triton"))
    assert max(two_parts_a_run, default=0) > 2


@MODES
def test_any_layout(training: bool) -> None:
    call = stem_call(case("out_odd"), FP32, training)
    strided = torch.cat([call.x] * 2, 3)[..., 1 : 1 + call.x.shape[3]]
    for x in (nchw_copy(call.x), strided):
        given = call.with_tensors(x=x)
        assert_same(run(given, "triton"), run(given.with_tensors(x=x.clone()), "triton"))


@pytest.mark.exhaustive
def test_more_taps_than_a_step() -> None:
    check(stem_call(StemCase("drawn", 2, 12, 8, 4, 5), MIXED, training=True), "triton")


def test_statistics_far_from_zero() -> None:
    call = stem_call(case("k5_stride_1"), FP32, training=True)
    weight = call.tensors["weight"].abs() + 0.1
    weight /= weight.sum((1, 2, 3), keepdim=True)
    call = call.with_options(padding=0, momentum=1.0)
    check(call.with_tensors(x=5 * call.x + 1000, weight=weight), "triton", wanted=())


@pytest.mark.exhaustive
def test_what_is_wanted_changes_no_bits() -> None:
    call = stem_call(case("same_k5"), FP32, training=True)
    full = run(call, "triton")
    for wanted in call.differentiable:
        assert_same(run(call, "triton", wanted=[wanted]), full)


@MODES
def test_another_stride_over_columns(training: bool) -> None:
    check_oblong_stride("triton", training)


def test_auto_takes_other_backends_here() -> None:
    call = stem_call(case("out_odd"))
    with pytest.raises(AssertionError):
        assert_same(run(call, "triton"), run(call, "cpu"))
    assert ops.stem_conv_bn_silu(**call.tensors, backend="triton").shape == (2, 21, 5, 4)


@triton.jit
def sigmoid_only(grad, u, lo, hi, ACT: tl.constexpr):
    return grad / (1.0 + tl.exp(-u))


@triton.jit
def in_order(k, CIN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr):
    return k


@triton.jit
def without_means(
    grad, z, norm, sums, inverse, lo, hi, at, n, inside, n_inside, channels, ACT: tl.constexpr
):
    du = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    return du * tl.load(norm + n, mask=n_inside, other=0.0)[None, :]


@triton.jit
def without_deviation(z, mask, count):
    mean = tl.sum(tl.where(mask, z, 0.0), 0) / tl.maximum(count, 1.0)
    return mean, tl.sum(tl.where(mask, z * z, 0.0), 0), mean * 0.0


FAULTS = {
    "grad_through": sigmoid_only,
    "weight_offset": in_order,
    "load_dz": without_means,
    "tile_statistics": without_deviation,
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_function_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, name, FAULTS[name])
    with pytest.raises(AssertionError):
        check(stem_call(case("out_odd"), FP32, training=True), "triton")
