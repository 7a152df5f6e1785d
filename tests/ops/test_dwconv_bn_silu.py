"""dwconv_bn_silu on every backend and shape against the reference."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cases import DWCONV_CASES, LARGE_DWCONV_CASES, DwconvCase, find, find_param
from drawn import DRAWS
from effnet_fast import ops
from effnet_fast.ops.cuda import tiles
from effnet_fast.ops.dwconv_bn_silu import eval_op
from parity import (
    BACKENDS,
    BF16,
    CUDA_BACKENDS,
    CUDA_DTYPES,
    CUDA_NAMES,
    FP16,
    FP32,
    MODES,
    NEEDS_SIMT,
    VECTOR,
    Call,
    Dtypes,
    Results,
    assert_parity,
    assert_same,
    check,
    check_over_draws,
    device_of,
    dwconv_call,
    matrix,
    on_device,
    run,
    runs,
)
from tolerances import SILU_BIAS, assert_no_worse_than

case = functools.partial(find, DWCONV_CASES)
ANY_BACKEND = pytest.mark.parametrize("backend", [*BACKENDS, *CUDA_BACKENDS])
ANY_RUN = runs()
# Gradients in training are those of one pass whether or not they are asked for: no third way.
WAYS = pytest.mark.parametrize(
    ("training", "autograd"),
    [(False, False), (False, True), (True, True)],
    ids=["eval-no_grad", "eval-grad", "train"],
)


def has_kernel(backend: str, case: DwconvCase) -> bool:
    return backend not in CUDA_NAMES or case.k in tiles.KERNELS


@functools.lru_cache(maxsize=2)
def expectation(
    case: DwconvCase, dtypes: Dtypes, training: bool, autograd: bool
) -> tuple[Call, Results, Results]:
    """The call, and its results in stock's arithmetic and in float64."""
    call = dwconv_call(case, dtypes, training)
    wanted = None if autograd else ()
    return call, run(call, wanted=wanted), run(call, double=True, wanted=wanted)


@matrix([c for c in DWCONV_CASES if c.values[0].c > 1], takes=has_kernel)
@WAYS
def test_matches_reference(
    training: bool, autograd: bool, case: DwconvCase, dtypes: Dtypes, backend: str
) -> None:
    call, stock, exact = expectation(case, dtypes, training, autograd)
    actual = run(call, backend, wanted=None if autograd else ())
    assert_parity(actual, stock, exact, dtypes.x)
    if training:
        assert_same(run(call, backend, wanted=()), actual)


@runs(CUDA_DTYPES)
@MODES
def test_one_channel(training: bool, dtypes: Dtypes, backend: str) -> None:
    check_over_draws(dwconv_call(case("c_one"), dtypes, training), backend, 32)


@matrix(LARGE_DWCONV_CASES, (FP32, BF16, FP16), ("cpu", *CUDA_NAMES), has_kernel)
@pytest.mark.parametrize(
    ("training", "wanted"), [(False, ()), (True, None)], ids=["eval-no_grad", "train-grad"]
)
def test_matches_reference_where_large(
    training: bool, wanted: tuple[str, ...] | None, case: DwconvCase, dtypes: Dtypes, backend: str
) -> None:
    check(dwconv_call(case, dtypes, training), backend, wanted=wanted)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", pytest.param("simt", marks=NEEDS_SIMT)])
def test_parity_notices_a_wrong_tap(backend: str) -> None:
    call = dwconv_call(case("b0_c240_28_k5_s1"))
    stock, exact = run(call), run(call, double=True)
    weight = call.tensors["weight"].clone()
    weight[3, 0, 0, 4] += 1e-3
    actual = run(call.with_tensors(weight=weight), backend)
    for name in ("y", "grad x", "grad bn_weight"):
        with pytest.raises(AssertionError, match=name):
            assert_parity(*({name: r[name]} for r in (actual, stock, exact)), torch.float32)


@ANY_RUN
@pytest.mark.usefixtures("table_tiles")
@pytest.mark.parametrize("name", ["7x9", "c_gt_block_stride_2", "h_gt_chunk", "one_pixel"])
def test_pooled_mean_of_y(name: str, dtypes: Dtypes, backend: str) -> None:
    """The mean over H and W that squeeze-and-excite takes from the eval kernel."""
    call = dwconv_call(case(name), dtypes)
    pad = (call.options["padding"] or (call.tensors["weight"].shape[-1] - 1) // 2,) * 4
    options = (call.options["stride"], pad, 1e-5, "silu", backend)
    device = device_of(backend, call.x)
    y, pooled = eval_op(*(on_device(t, device) for t in call.tensors.values()), *options)
    y, pooled = y.cpu(), pooled.cpu()
    assert pooled.dtype == torch.float32
    exact = run(call, double=True, wanted=())["y"].mean((2, 3))
    stock = F.adaptive_avg_pool2d(run(call, wanted=())["y"], 1).flatten(1).float()
    assert_no_worse_than(pooled, stock, exact, dtype=dtypes.x)
    assert_no_worse_than(pooled, y.float().mean((2, 3)), y.double().mean((2, 3)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_silu_has_no_bias(backend: str) -> None:
    """Errors of one sign add up from layer to layer, where those of chance cancel."""
    pixels = torch.rand(8, 1, 160, 1000) * 2 + torch.arange(-8.0, 8.0, 2).view(8, 1, 1, 1)
    none, zero, one = None, torch.zeros(1), torch.ones(1)
    y = torch.ops.effnet_fast.bn_silu(pixels, none, none, zero, one, 0.0, "silu", backend)
    exact = F.silu(pixels.double())
    relative = ((y - exact) / exact.abs().clamp_min(1e-30)).mean((1, 2, 3))
    assert relative.abs().max() < SILU_BIAS * torch.finfo(torch.float32).eps, relative


ABSENT = {
    "bn_weight": ["bn_weight"],
    "bn_bias": ["bn_bias"],
    "affine": ["bn_weight", "bn_bias"],
    "running": ["running_mean", "running_var"],
    "all": ["bn_weight", "bn_bias", "running_mean", "running_var"],
}


@ANY_RUN
@MODES
@pytest.mark.parametrize("absent", ABSENT)
def test_absent_vectors(absent: str, training: bool, dtypes: Dtypes, backend: str) -> None:
    names = ABSENT[absent]
    call = dwconv_call(case("c_odd"), dtypes, training).with_tensors(**dict.fromkeys(names))
    if not training and "running_mean" in names:
        with pytest.raises(ValueError, match="None only with training=True"):
            run(call, backend)
    else:
        check(call, backend)
        check(call, backend, wanted=())


@ANY_BACKEND
@MODES
def test_frozen_subsets_change_no_number(training: bool, backend: str) -> None:
    call = dwconv_call(case("h_gt_chunk_k5_stride_2"), BF16, training)
    every = run(call, backend)
    for count in range(1, len(call.differentiable)):
        for wanted in itertools.combinations(call.differentiable, count):
            assert_same(run(call, backend, wanted=wanted), every)


MEANS = {torch.float32: 1000.0, torch.bfloat16: 8.0, torch.float16: 60.0}


@matrix(
    [
        find_param(DWCONV_CASES, n)
        for n in ("b0_c96_112_k3_s2", "batch_gt_groups", "w_gt_strip", "k1")
    ],
    (FP32, BF16, FP16),
    takes=has_kernel,
)
def test_statistics_far_from_zero(case: DwconvCase, dtypes: Dtypes, backend: str) -> None:
    """z has a mean that is large for its dtype and a standard deviation of about 1."""
    mean = MEANS[dtypes.x]
    call = dwconv_call(case, dtypes, training=True).with_options(padding=0, momentum=1.0)
    taps = call.tensors["weight"].shape[-1] ** 2
    weight = torch.full_like(call.tensors["weight"], 1 / taps)
    call = call.with_tensors(x=(call.x * taps**0.5 + mean).to(dtypes.x), weight=weight)
    actual = check(call, backend)
    assert abs(actual["running_mean"].mean() - mean) < 0.2
    assert 0.5 < actual["running_var"].mean() < 2


@ANY_RUN
def test_several_updates_of_running_statistics(dtypes: Dtypes, backend: str) -> None:
    call = dwconv_call(case("8x10_stride_2"), dtypes, training=True).with_options(momentum=0.3)
    results = []
    for kwargs in ({"backend": backend}, {}, {"double": True}):
        statistics = {}
        for step in range(3):
            next_call = call.with_tensors(x=call.x + step, **statistics)
            statistics = run(next_call, **kwargs, wanted=())
            statistics.pop("y")
        results.append(statistics)
    assert_parity(*results, dtypes.x)


@ANY_BACKEND
@MODES
def test_momentum_and_eps(training: bool, backend: str) -> None:
    call = dwconv_call(case("c_eq_vector"), FP32, training)
    for momentum, eps in ((0.01, 1e-3), (1.0, 0.5), (0.0, 1e-5)):
        check(call.with_options(momentum=momentum, eps=eps), backend)


@ANY_BACKEND
@pytest.mark.parametrize("autograd", [False, True], ids=["no_grad", "grad"])
def test_one_value_per_channel(autograd: bool, backend: str) -> None:
    call = dwconv_call(DwconvCase("one_value", 1, 5, 1, 1, 3), FP32, training=True)
    errors = []
    for name in (backend, None):
        before = call.tensors["running_mean"].clone()
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as info:
            run(call, name, wanted=None if autograd else ())
        errors.append(str(info.value))
        assert torch.equal(call.tensors["running_mean"], before)
    assert errors[0] == errors[1]
    check(call.with_options(training=False), backend)


INTERIOR = ((0, 1, 3, 3), (1, 4, 3, 3), (1, 5, 3, 3), (0, 7, 4, 4))
BORDER = ((0, 1, 0, 0), (1, 4, -1, -1), (1, 5, 3, 0), (0, 7, -1, 2))
NOT_FINITE = (float("nan"), float("inf"), -float("inf"), float("nan"))


def spoil(tensor: Tensor, places: tuple[tuple[int, ...], ...]) -> Tensor:
    """A copy [N,C,H,W] with NaN and both infinities at some places, the last channel all inf."""
    tensor = tensor.clone()
    for place, value in zip(places, NOT_FINITE, strict=True):
        tensor[place] = value
    tensor[:, -1] = float("inf")
    return tensor


def spoilt(*names: str) -> pytest.MarkDecorator:
    return matrix(
        [find_param(DWCONV_CASES, n) for n in names], (FP32, BF16, FP16), takes=has_kernel
    )


@spoilt("7x9", "7x9_stride_2", "c_odd", "k7")
@MODES
def test_nan_and_inf_in_x(training: bool, case: DwconvCase, dtypes: Dtypes, backend: str) -> None:
    """They appear where stock has them, in y and statistics, and in the gradients in eval."""
    call = dwconv_call(case, dtypes, training)
    call = call.with_tensors(x=spoil(spoil(call.x, INTERIOR), BORDER))
    actual = check(call, backend, wanted=())
    assert actual["y"].isnan().any()
    assert actual["y"].isinf().any() != training
    if not training:
        check(call, backend)


def taps_that_meet(places: Tensor, call: Call) -> Tensor:
    """Which taps of the weight meet a pixel of the image at one of these places of y, a mask."""
    weight = torch.zeros_like(call.tensors["weight"], dtype=torch.float32, requires_grad=True)
    padding = weight.shape[-1] // 2
    y = F.conv2d(torch.ones(call.x.shape), weight, padding=padding, groups=len(weight))
    return torch.autograd.grad(y, weight, places.float())[0] > 0


@spoilt("7x9", "c_odd", "k7")
@pytest.mark.parametrize("places", [INTERIOR, BORDER], ids=["interior", "border"])
def test_nan_and_inf_in_grad_y(
    places: tuple[tuple[int, ...], ...], case: DwconvCase, dtypes: Dtypes, backend: str
) -> None:
    """They appear where stock has them, but for taps that a border's pixels leave untouched.

    There stock skips the padding or multiplies it, as processor, dtype and layout have it.
    """
    call = dwconv_call(case, dtypes)
    grad_y = spoil(torch.ones_like(call.x), places)
    actual, stock, exact = (
        run(call, *args, double=double, grad_y=grad_y)
        for args, double in (((backend,), False), ((), False), ((), True))
    )
    assert actual["grad x"].isnan().any()
    if places is BORDER:
        taps, *_ = (results.pop("grad weight") for results in (actual, stock, exact))
        assert taps[taps_that_meet(grad_y.isnan(), call)].isnan().all()
        assert not taps[taps_that_meet(grad_y.isinf(), call)].isfinite().any()
        assert taps[[0, 2, 3, 6]].isfinite().all()
    assert_parity(actual, stock, exact, dtypes.x)


@ANY_BACKEND
def test_nan_and_inf_in_vectors(backend: str) -> None:
    call = dwconv_call(case("c_odd"))
    for name in ("bn_weight", "bn_bias", "running_mean", "running_var"):
        vector = call.tensors[name].clone()
        vector[1], vector[3], vector[-1] = float("nan"), float("inf"), -float("inf")
        check(call.with_tensors(**{name: vector}), backend, wanted=())


@st.composite
def dwconv_cases(draw: st.DrawFn, kernels: Sequence[int]) -> DwconvCase:
    """Shapes of up to about 10,000 values whose output has at least 64, so that rms means much.

    And at least 16 of each channel: BatchNorm divides rounding errors by the deviation of few
    values, however small. With 3 values 14 of 400 draws broke the rule by chance, with 16 none.
    """
    k = draw(st.sampled_from(kernels))
    stride = draw(st.sampled_from([1, 2]))
    sides = st.integers(0, k + 1)
    padding = draw(st.one_of(st.none(), sides, st.tuples(sides, sides, sides, sides)))
    n, c = draw(st.integers(1, 6)), draw(st.integers(8, 70))
    h, w = draw(st.integers(k, 24)), draw(st.integers(k, 40))
    drawn = DwconvCase("drawn", n, c, h, w, k, stride, padding)
    values = drawn.values_per_channel
    rest = max(-(-64 // (c * values)), -(-16 // values))
    return DwconvCase("drawn", n * rest, c, h, w, k, stride, padding)


@pytest.mark.slow
@ANY_RUN
@MODES
@DRAWS
@pytest.mark.usefixtures("table_tiles")
def test_drawn_shapes(draws: settings, training: bool, dtypes: Dtypes, backend: str) -> None:
    kernels = tiles.KERNELS if backend in CUDA_NAMES else (1, 3, 3, 5, 5, 7, 11)

    @draws
    @given(dwconv_cases(kernels))
    def examine(drawn: DwconvCase) -> None:
        call = dwconv_call(drawn, dtypes, training)
        # BatchNorm leaves the gradient of a 1x1 weight nothing but rounding. Of 240 such vectors
        # of 17 numbers, 4 broke the rule by chance; of 80 times three of them, none.
        check_over_draws(call, backend, drawn.c if training else max(drawn.c, VECTOR // 4))
        if not training:
            check(call, backend, wanted=())

    examine()


def test_auto_takes_the_kernel() -> None:
    """Never the host run of the CUDA kernels, which is for who asks for it."""
    call = dwconv_call(case("c_odd"), training=True)
    assert_same(run(call, "auto"), run(call, "cpu"))
    with pytest.raises(AssertionError):
        assert_same(run(call, "auto"), run(call))


def test_defaults() -> None:
    call = dwconv_call(case("c_odd"))
    assert torch.equal(ops.dwconv_bn_silu(**call.tensors), run(call, "cpu", wanted=())["y"])
