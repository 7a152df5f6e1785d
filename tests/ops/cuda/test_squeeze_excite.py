"""squeeze_excite on the CUDA kernels, run on the CPU and on a GPU, against the reference."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import LARGE_SQUEEZE_EXCITE_CASES, SQUEEZE_EXCITE_CASES, SqueezeExciteCase, find
from drawn import DRAWS
from effnet_fast.ops.cuda.squeeze_excite import splits_of
from parity import (
    BF16,
    CUDA_BACKENDS,
    CUDA_DTYPES,
    FP16,
    FP32,
    NEEDS_SIMT,
    Dtypes,
    assert_parity,
    assert_same,
    check,
    run,
    squeeze_excite_call,
)

case = functools.partial(find, SQUEEZE_EXCITE_CASES)
ANY_BACKEND = pytest.mark.parametrize("backend", CUDA_BACKENDS)
ANY_DTYPE = pytest.mark.parametrize("dtypes", [FP32, BF16, FP16], ids=str)
MANY = SqueezeExciteCase("several_splits_and_images", 37, 1100, 2, 3, 33)


@ANY_BACKEND
@pytest.mark.parametrize("dtypes", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("autograd", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("case", [*SQUEEZE_EXCITE_CASES, pytest.param(MANY, id=MANY.name)])
def test_matches_reference(
    case: SqueezeExciteCase, autograd: bool, dtypes: Dtypes, backend: str
) -> None:
    check(squeeze_excite_call(case, dtypes), backend, wanted=None if autograd else ())


@ANY_BACKEND
@ANY_DTYPE
@pytest.mark.parametrize("case", LARGE_SQUEEZE_EXCITE_CASES)
def test_matches_reference_where_large(
    case: SqueezeExciteCase, dtypes: Dtypes, backend: str
) -> None:
    check(squeeze_excite_call(case, dtypes), backend)


@NEEDS_SIMT
def test_parity_notices_swapped_channels() -> None:
    call = squeeze_excite_call(case("b0_c240_28_r10"))
    stock, exact = run(call), run(call, double=True)
    for name in ("reduce_weight", "expand_weight"):
        weight = call.tensors[name].clone()
        weight[[0, 3]] = weight[[3, 0]]
        actual = run(call.with_tensors(**{name: weight}), "simt")
        with pytest.raises(AssertionError, match="y: rms error"):
            assert_parity(actual, stock, exact, torch.float32)


@ANY_BACKEND
@ANY_DTYPE
@pytest.mark.parametrize("absent", ["reduce_bias", "expand_bias"])
def test_absent_biases(absent: str, dtypes: Dtypes, backend: str) -> None:
    check(squeeze_excite_call(case("c_odd"), dtypes).with_tensors(**{absent: None}), backend)


@ANY_BACKEND
@ANY_DTYPE
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_inf(value: float, dtypes: Dtypes, backend: str) -> None:
    """They appear in the image whose gate they reach, as with stock."""
    call = squeeze_excite_call(case("c_odd"), dtypes)
    x = call.x.clone()
    x[0, 1, 3, 4] = value
    actual = check(call.with_tensors(x=x), backend)
    assert not actual["y"][0].isfinite().all()
    assert actual["y"][1].isfinite().all()
    grad_y = torch.ones_like(call.x)
    grad_y[0, 1, 3, 4] = value
    check(call, backend, grad_y=grad_y)


@ANY_BACKEND
@ANY_DTYPE
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
        check(squeeze_excite_call(SqueezeExciteCase("drawn", n, c, h, w, r), dtypes), backend)

    examine()


def test_few_images_split_the_first_layer() -> None:
    """Into parts of 256 to 1024 channels, for two blocks on each of 132 multiprocessors."""
    assert splits_of(1, 3840, 160) == 7  # 40 blocks of rows
    assert splits_of(64, 3840, 160) == 4  # 640 blocks
    assert splits_of(1, 240, 10) == 1
    assert splits_of(1, 1152, 48) == 5
    assert splits_of(64, 1152, 48) == 2


@ANY_BACKEND
def test_two_runs(backend: str) -> None:
    call = squeeze_excite_call(MANY, BF16)
    assert_same(run(call, backend), run(call, backend))


@ANY_BACKEND
def test_too_many_hidden_channels(backend: str) -> None:
    call = squeeze_excite_call(SqueezeExciteCase("r_gt_shared", 1, 4, 2, 2, 6001))
    with pytest.raises(RuntimeError, match=f"R is 6001; {backend} takes up to 6000"):
        run(call, backend)
    check(squeeze_excite_call(SqueezeExciteCase("r_most", 1, 4, 2, 2, 6000)), backend)
