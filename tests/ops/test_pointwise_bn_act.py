"""pointwise_bn_act on every backend and shape against the reference."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiers
from cases import LARGE_POINTWISE_CASES, POINTWISE_CASES, PointwiseCase, find
from drawn import DRAWS
from effnet_fast import ops
from parity import (
    BACKENDS,
    BF16,
    DTYPES,
    FP32,
    MODES,
    Call,
    Dtypes,
    Results,
    assert_parity,
    assert_same,
    check,
    matrix,
    pointwise_call,
    run,
    runs,
)

case = functools.partial(find, POINTWISE_CASES)
ANY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
ANY_DTYPE = pytest.mark.parametrize("dtypes", [FP32, BF16], ids=str)
ANY_RUN = runs((FP32, BF16), tiers.INSTRUCTION_SETS)
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))
PIXELS = ((2, 3), (0, 1), (1, 4))


@functools.lru_cache(maxsize=2)
def expectation(case: PointwiseCase, dtypes: Dtypes) -> tuple[Call, Results, Results]:
    """The call, and its results in stock's arithmetic and in float64."""
    call = pointwise_call(case, dtypes)
    return call, run(call, wanted=()), run(call, double=True, wanted=())


@matrix(POINTWISE_CASES, DTYPES, tiers.INSTRUCTION_SETS)
def test_matches_reference(case: PointwiseCase, dtypes: Dtypes, backend: str) -> None:
    call, stock, exact = expectation(case, dtypes)
    assert_parity(run(call, backend, wanted=()), stock, exact, dtypes.x)


@matrix(LARGE_POINTWISE_CASES, (FP32, BF16), ("cpu",))
def test_matches_reference_where_large(case: PointwiseCase, dtypes: Dtypes, backend: str) -> None:
    check(pointwise_call(case, dtypes), backend, wanted=())


@ANY_DTYPE
@MODES
@pytest.mark.parametrize("name", ["c_odd", "no_act", "gate_residual_no_act", "one_pixel"])
def test_auto_falls_back_for_gradients(name: str, training: bool, dtypes: Dtypes) -> None:
    call = pointwise_call(case(name), dtypes, training)
    assert_same(run(call, "auto"), run(call))
    if training:
        assert_same(run(call, "auto", wanted=()), run(call, wanted=()))


@MODES
def test_named_backend_does_not_fall_back(training: bool) -> None:
    call = pointwise_call(case("c_odd"), training=training)
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run pointwise_bn_act: .*no gradients"):
        run(call, "cpu")
    if training:
        with pytest.raises(RuntimeError, match="no training"):
            run(call, "cpu", wanted=())


def test_parity_notices_swapped_channels() -> None:
    call, stock, exact = expectation(case("b0_expand_c40_240_28"), FP32)
    weight = call.tensors["weight"].clone()
    weight[[0, 3]] = weight[[3, 0]]
    actual = run(call.with_tensors(weight=weight), "cpu", wanted=())
    with pytest.raises(AssertionError, match="y: rms error"):
        assert_parity(actual, stock, exact, torch.float32)


@ANY_RUN
@pytest.mark.parametrize(
    "absent", [["bn_weight"], ["bn_bias"], ["bn_weight", "bn_bias"]], ids="+".join
)
def test_absent_vectors(absent: list[str], dtypes: Dtypes, backend: str) -> None:
    call = pointwise_call(case("gate_residual_no_act"), dtypes)
    check(call.with_tensors(**dict.fromkeys(absent)), backend, wanted=())


@ANY_RUN
@pytest.mark.parametrize("name", ["gate", "gate_out_gt_pixels", "residual"])
def test_dtypes_of_gate_and_residual(name: str, dtypes: Dtypes, backend: str) -> None:
    """The other one of fp32 and bf16 than x has."""
    other = torch.float32 if dtypes is BF16 else torch.bfloat16
    call = pointwise_call(case(name), dtypes)
    for argument in ("gate", "residual"):
        if call.tensors[argument] is None:
            continue
        changed = call.with_tensors(**{argument: call.tensors[argument].to(other)})
        if other is torch.float32:
            check(changed, backend, wanted=())
        else:
            with pytest.raises(RuntimeError, match=r"bfloat16; allowed are torch\.float32"):
                run(changed, backend, wanted=())


@ANY_BACKEND
def test_momentum_and_eps(backend: str) -> None:
    call = pointwise_call(case("c_odd"))
    for momentum, eps in ((0.01, 1e-3), (1.0, 0.5)):
        check(call.with_options(momentum=momentum, eps=eps), backend, wanted=())


@ANY_BACKEND
@pytest.mark.parametrize("name", ["c_odd", "gate", "gate_out_gt_pixels"])
def test_edits_in_place_count(name: str, backend: str) -> None:
    """Whatever an implementation keeps between calls follows its sources."""
    call = pointwise_call(case(name))
    for argument in ("weight", "bn_weight", "bn_bias", "running_mean", "running_var"):
        before = run(call, backend, wanted=())
        tensor = call.tensors[argument]
        tensor.data[0] += 0.25  # does not bump the version counter
        after = check(call, backend, wanted=())
        assert not torch.equal(before["y"], after["y"])
        with torch.no_grad():
            tensor[1] += 0.25
        assert not torch.equal(check(call, backend, wanted=())["y"], after["y"])


@ANY_RUN
@pytest.mark.parametrize("name", ["c_odd", "gate", "gate_out_gt_pixels", "residual"])
def test_nan_and_inf(name: str, dtypes: Dtypes, backend: str) -> None:
    """Each in a pixel of its own, which they reach whole.

    Not with 40 channels: there oneDNN's bf16 product lets a NaN reach the pixel before it.
    """
    call = pointwise_call(case(name), dtypes)
    for argument in ("x", "residual"):
        if call.tensors[argument] is None:
            continue
        tensor = call.tensors[argument].clone()
        for (row, column), value in zip(PIXELS, NOT_FINITE, strict=True):
            tensor[0, 1, row, column] = value
        actual = check(call.with_tensors(**{argument: tensor}), backend, wanted=())
        for row, column in PIXELS:
            assert not actual["y"][0, :, row, column].isfinite().all()
        assert actual["y"][1].isfinite().all()


@pytest.mark.slow
@ANY_RUN
@DRAWS
def test_drawn_shapes(draws: settings, dtypes: Dtypes, backend: str) -> None:
    @draws
    @given(
        sizes=st.tuples(*(st.integers(1, limit) for limit in (4, 90, 90, 12, 12))),
        act=st.sampled_from(["silu", None]),
        gate=st.booleans(),
        residual=st.booleans(),
    )
    def examine(sizes: tuple[int, ...], act: str | None, gate: bool, residual: bool) -> None:
        n, c, out, h, w = sizes
        out = max(out, -(-64 // (n * h * w)))  # at least 64 values, so that rms means much
        drawn = PointwiseCase("drawn", n, c, out, h, w, act, gate, residual)
        check(pointwise_call(drawn, dtypes), backend, wanted=())

    examine()


def test_inputs_are_left_alone() -> None:
    call = pointwise_call(case("gate_residual_no_act"))
    before: dict[str, Tensor] = {k: v.clone() for k, v in call.tensors.items()}
    y = ops.pointwise_bn_act(**call.tensors, **call.options, backend="cpu")
    y.fill_(0)
    assert all(torch.equal(call.tensors[k], v) for k, v in before.items())


def test_auto_takes_the_kernel() -> None:
    call = pointwise_call(case("c_odd"))
    with torch.no_grad():
        y = ops.pointwise_bn_act(**call.tensors)
    assert torch.equal(y, run(call, "cpu", wanted=())["y"])
    assert not torch.equal(y, run(call, wanted=())["y"])
