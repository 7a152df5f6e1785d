"""squeeze_excite on every backend and shape against the reference."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import (
    LARGE_SQUEEZE_EXCITE_CASES,
    SQUEEZE_EXCITE_CASES,
    SqueezeExciteCase,
    find,
)
from drawn import DRAWS
from effnet_fast import ops
from effnet_fast.ops.cuda.squeeze_excite import splits_of
from parity import (
    BACKENDS,
    BF16,
    CUDA_BACKENDS,
    CUDA_NAMES,
    FP16,
    FP32,
    NEEDS_SIMT,
    Call,
    Dtypes,
    Results,
    assert_parity,
    assert_same,
    check,
    check_over_draws,
    matrix,
    run,
    runs,
    squeeze_excite_call,
)

case = functools.partial(find, SQUEEZE_EXCITE_CASES)
ANY_BACKEND = pytest.mark.parametrize("backend", [*BACKENDS, *CUDA_BACKENDS])
ANY_RUN = runs()
MANY = SqueezeExciteCase("several_splits_and_images", 37, 1100, 2, 3, 33)
WEIGHTS = ("reduce_weight", "expand_weight")
BIASES = ("reduce_bias", "expand_bias")


@functools.lru_cache(maxsize=2)
def expectation(case: SqueezeExciteCase, dtypes: Dtypes) -> tuple[Call, Results, Results]:
    """The call, and its results in stock's arithmetic and in float64."""
    call = squeeze_excite_call(case, dtypes)
    return call, run(call), run(call, double=True)


@matrix([*SQUEEZE_EXCITE_CASES, pytest.param(MANY, id=MANY.name)])
def test_matches_reference(case: SqueezeExciteCase, dtypes: Dtypes, backend: str) -> None:
    """With gradients; without them the output's bits are the same."""
    call, stock, exact = expectation(case, dtypes)
    actual = run(call, backend)
    assert_parity(actual, stock, exact, dtypes.x)
    assert_same(run(call, backend, wanted=()), actual)


@matrix(LARGE_SQUEEZE_EXCITE_CASES, (FP32, BF16, FP16), ("cpu", *CUDA_NAMES))
def test_matches_reference_where_large(
    case: SqueezeExciteCase, dtypes: Dtypes, backend: str
) -> None:
    check(squeeze_excite_call(case, dtypes), backend)


@pytest.mark.parametrize("backend", ["cpu", pytest.param("simt", marks=NEEDS_SIMT)])
def test_parity_notices_swapped_channels(backend: str) -> None:
    call = squeeze_excite_call(case("b0_c240_28_r10"))
    stock, exact = run(call), run(call, double=True)
    for name in WEIGHTS:
        weight = call.tensors[name].clone()
        weight[[0, 3]] = weight[[3, 0]]
        actual = run(call.with_tensors(**{name: weight}), backend)
        with pytest.raises(AssertionError, match="y: rms error"):
            assert_parity(actual, stock, exact, torch.float32)


@ANY_RUN
@pytest.mark.parametrize("absent", [BIASES[:1], BIASES[1:], BIASES], ids="+".join)
def test_absent_biases(absent: tuple[str, ...], dtypes: Dtypes, backend: str) -> None:
    call = squeeze_excite_call(case("c_odd"), dtypes)
    check(call.with_tensors(**dict.fromkeys(absent)), backend)


@ANY_BACKEND
def test_two_dimensional_weights(backend: str) -> None:
    """As linear layers have them: the same numbers, gradients in the weights' own shape."""
    call = squeeze_excite_call(case("c_odd"))
    flat = call.with_tensors(**{name: call.tensors[name].flatten(1) for name in WEIGHTS})
    actual, expected = check(flat, backend), run(call, backend)
    assert_same(actual, expected | {f"grad {n}": expected[f"grad {n}"].flatten(1) for n in WEIGHTS})


@ANY_BACKEND
def test_frozen_subsets_change_no_number(backend: str) -> None:
    call = squeeze_excite_call(case("hw_gt_chunk"), BF16)
    every = run(call, backend)
    for count in range(1, len(call.differentiable)):
        for wanted in itertools.combinations(call.differentiable, count):
            assert_same(run(call, backend, wanted=wanted), every)


@ANY_RUN
@pytest.mark.parametrize(("offset", "scale"), [(100.0, 0.3), (0.0, 1e4), (0.0, 1e-30)], ids=str)
def test_range(offset: float, scale: float, dtypes: Dtypes, backend: str) -> None:
    """Gates at both ends of the sigmoid, a mean of many equal values, and tiny ones."""
    call = squeeze_excite_call(case("hw_gt_chunk"), dtypes)
    if dtypes.x is torch.float16:
        scale = min(scale, 1e3)  # stock's hidden layer overflows above
    check(call.with_tensors(x=call.x * scale + offset), backend)


NOT_FINITE = (float("nan"), float("inf"), -float("inf"))


def spoil(tensor: Tensor) -> Tensor:
    """A copy with a number of each kind in an image of its own; the last image stays as it is."""
    tensor = tensor.clone()
    for image, value in zip(tensor, NOT_FINITE, strict=False):
        image[1, 3, 4] = image[-1, 0, 0] = value
    return tensor


@ANY_RUN
def test_nan_and_inf(dtypes: Dtypes, backend: str) -> None:
    """In x and in grad_y: they appear in the image whose gate they reach, as with stock."""
    call = squeeze_excite_call(SqueezeExciteCase("four_images", 4, 37, 7, 9, 9), dtypes)
    actual = check(call.with_tensors(x=spoil(call.x)), backend)
    assert [image.isfinite().all().item() for image in actual["y"]] == [False] * 3 + [True]
    check(call, backend, grad_y=spoil(torch.ones_like(call.x)))
    bias = call.tensors["expand_bias"].clone()
    bias[:3] = torch.tensor(NOT_FINITE)
    check(call.with_tensors(expand_bias=bias), backend)


@ANY_RUN
@DRAWS
def test_drawn_shapes(draws: settings, dtypes: Dtypes, backend: str) -> None:
    @draws
    @given(
        n=st.integers(1, 9),
        c=st.integers(16, 90),
        h=st.integers(2, 26),
        w=st.integers(2, 26),
        r=st.integers(4, 40),
    )
    def examine(n: int, c: int, h: int, w: int, r: int) -> None:
        call = squeeze_excite_call(SqueezeExciteCase("drawn", n, c, h, w, r), dtypes)
        # The gradients of reduce_weight share the errors of the hidden layer's n * r numbers.
        check_over_draws(call, backend, n * r)

    examine()


def test_few_images_split_the_first_layer() -> None:
    """Into parts of 256 to 1024 channels, for two blocks on each of 132 multiprocessors."""
    assert splits_of(1, 3840, 160) == 7  # 40 blocks of rows
    assert splits_of(64, 3840, 160) == 4  # 640 blocks
    assert splits_of(1, 240, 10) == 1
    assert splits_of(1, 1152, 48) == 5
    assert splits_of(64, 1152, 48) == 2


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_too_many_hidden_channels(backend: str) -> None:
    call = squeeze_excite_call(SqueezeExciteCase("r_gt_shared", 1, 4, 2, 2, 6001))
    with pytest.raises(RuntimeError, match=f"R is 6001; {backend} takes up to 6000"):
        run(call, backend)
    check(squeeze_excite_call(SqueezeExciteCase("r_most", 1, 4, 2, 2, 6000)), backend)


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_two_runs(backend: str) -> None:
    call = squeeze_excite_call(MANY, BF16)
    assert_same(run(call, backend), run(call, backend))


def test_auto_takes_the_kernel() -> None:
    call = squeeze_excite_call(case("c_odd"))
    assert_same(run(call, "auto"), run(call, "cpu"))
    with pytest.raises(AssertionError):
        assert_same(run(call, "auto"), run(call))


def test_defaults() -> None:
    call = squeeze_excite_call(case("c_odd"))
    assert torch.equal(ops.squeeze_excite(**call.tensors), run(call, "cpu", wanted=())["y"])
