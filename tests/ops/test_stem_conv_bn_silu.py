"""stem_conv_bn_silu on every backend and shape against the reference."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tiers
from cases import LARGE_STEM_CASES, STEM_CASES, StemCase, find
from effnet_fast import ops
from effnet_fast.ops.stem_conv_bn_silu import conv_op
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
    channels_last,
    check,
    matrix,
    nchw_copy,
    run,
    stem_call,
    threaded,
)
from stems import check_oblong_stride

case = functools.partial(find, STEM_CASES)
ANY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
ANY_DTYPE = pytest.mark.parametrize("dtypes", [FP32, BF16], ids=str)


@functools.lru_cache(maxsize=2)
def expectation(
    case: StemCase, dtypes: Dtypes, training: bool, autograd: bool
) -> tuple[Call, Results, Results]:
    """The call, and its results in stock's arithmetic and in float64."""
    call = stem_call(case, dtypes, training)
    wanted = None if autograd else ()
    return call, run(call, wanted=wanted), run(call, double=True, wanted=wanted)


@matrix(STEM_CASES, DTYPES, tiers.INSTRUCTION_SETS)
@pytest.mark.parametrize(
    ("training", "autograd"),
    [(False, False), (False, True), (True, True)],
    ids=["eval-no_grad", "eval-grad", "train"],
)
def test_matches_reference(
    training: bool, autograd: bool, case: StemCase, dtypes: Dtypes, backend: str
) -> None:
    call, stock, exact = expectation(case, dtypes, training, autograd)
    before = call.x.clone()
    actual = run(call, backend, wanted=None if autograd else ())
    if training:
        assert_same(run(call, backend, wanted=()), actual)
    if autograd and case.h == 1 and dtypes.x is torch.bfloat16:
        # Stock leaves taps that meet no pixel unwritten there.
        taps, *others = (r["grad weight"] for r in (actual, stock, exact))
        assert taps.count_nonzero() == case.out * case.c
        for gradient in (taps, *others):
            gradient[:, :, [0, 2], :] = gradient[:, :, :, [0, 2]] = 0
    assert_parity(actual, stock, exact, dtypes.x)
    assert torch.equal(call.x, before)


@matrix(LARGE_STEM_CASES, (FP32, BF16), ("cpu",))
@pytest.mark.parametrize(
    ("training", "wanted"), [(False, ()), (True, None)], ids=["eval-no_grad", "train-grad"]
)
def test_matches_reference_where_large(
    training: bool, wanted: tuple[str, ...] | None, case: StemCase, dtypes: Dtypes, backend: str
) -> None:
    check(stem_call(case, dtypes, training), backend, wanted=wanted)


@pytest.mark.parametrize("batch", [1, 3, 8])
@MODES
def test_batches(batch: int, training: bool) -> None:
    check(stem_call(StemCase("drawn", batch, 3, 24, 13, 17), FP32, training), "cpu")


@MODES
def test_parity_notices_a_wrong_tap(training: bool) -> None:
    call = stem_call(case("k7_out_gt_group"), training=training)
    stock, exact = run(call), run(call, double=True)
    weight = call.tensors["weight"].clone()
    weight[3, 1, 2, 4] += 1e-2
    actual = run(call.with_tensors(weight=weight), "cpu")
    for name in ("y", "grad x", "grad weight", "grad bn_weight"):
        with pytest.raises(AssertionError, match=name):
            assert_parity(*({name: r[name]} for r in (actual, stock, exact)), torch.float32)


@MODES
@pytest.mark.parametrize("absent", ["affine", "statistics"])
def test_absent_vectors(absent: str, training: bool) -> None:
    names = {"affine": ("bn_weight", "bn_bias"), "statistics": ("running_mean", "running_var")}
    if absent == "statistics" and not training:
        with pytest.raises(ValueError, match="only with training=True"):
            run(stem_call(case("out_odd")).with_tensors(running_mean=None, running_var=None), "cpu")
        return
    call = stem_call(case("out_odd"), FP32, training)
    call = call.with_tensors(**dict.fromkeys(names[absent]))
    check(call, "cpu")
    check(call, "cpu", wanted=())


LAYOUTS = {
    "nchw": nchw_copy,
    "nchw_slice": lambda x: nchw_copy(torch.cat([x] * 3, 3))[:, :, :, 2 : 2 + x.shape[3]],
    "channel_slice": lambda x: channels_last(torch.cat([x, x], 1))[:, 1 : 1 + x.shape[1]],
    "every_second_pixel": lambda x: channels_last(x.repeat_interleave(2, 3))[..., ::2],
    "h_inside_w": lambda x: channels_last(x.transpose(2, 3)).transpose(2, 3),
    "one_channel_expanded": lambda x: x[:, :1].expand_as(x),
    "one_image_expanded": lambda x: x[:1].expand_as(x),
}


@ANY_DTYPE
@MODES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["out_odd", "same_k5"])
def test_any_layout_gives_the_same_bits(
    name: str, layout: str, training: bool, dtypes: Dtypes
) -> None:
    call = stem_call(case(name), dtypes, training)
    call = call.with_tensors(x=LAYOUTS[layout](call.x))
    dense = call.with_tensors(x=channels_last(call.x))
    for wanted in (None, ()):
        actual = run(call, "cpu", wanted=wanted)
        assert actual["y"].is_contiguous(memory_format=torch.channels_last)
        assert_same(actual, run(dense, "cpu", wanted=wanted))


@MODES
def test_gradients_and_saved_tensors_in_any_layout(training: bool) -> None:
    call = stem_call(case("same_even"), FP32, training)
    grad_y = torch.randn_like(run(call, wanted=())["y"])
    expected = run(call, "cpu", grad_y=grad_y)
    assert_same(run(call, "cpu", grad_y=nchw_copy(grad_y)), expected)
    with torch.autograd.graph.saved_tensors_hooks(nchw_copy, lambda t: t):
        assert_same(run(call, "cpu", grad_y=grad_y), expected)


@MODES
@pytest.mark.parametrize("name", ["out_odd", "same_k5"])
def test_what_is_wanted_changes_no_bits(name: str, training: bool) -> None:
    call = stem_call(case(name), FP32, training)
    full = run(call, "cpu")
    for wanted in call.differentiable:
        assert_same(run(call, "cpu", wanted=[wanted]), full)
    if training:
        assert_same(run(call, "cpu", wanted=()), full)


@threaded(STEM_CASES, ("c_eq_vector", "same_k5", "c_gt_chain", "h_gt_chunk", "batch_0", "b0"))
def test_any_number_of_threads(case: StemCase, dtypes: Dtypes, backend: str) -> None:
    """All but the gradient of x, which is torch's."""
    call = stem_call(case, dtypes, training=True)
    wanted = ("weight", "bn_weight", "bn_bias")
    expected = run(call, backend, wanted=wanted)
    inferred = run(call.with_options(training=False), backend, wanted=())
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_same(run(call, backend, wanted=wanted), expected)
        assert_same(run(call.with_options(training=False), backend, wanted=()), inferred)


@MODES
def test_another_stride_over_columns(training: bool) -> None:
    check_oblong_stride("cpu", training)


@ANY_BACKEND
@pytest.mark.parametrize(("dtypes", "mean"), [(FP32, 1000.0), (BF16, 8.0)], ids=str)
@pytest.mark.parametrize("name", ["h_gt_chunk", "w_gt_chain"])
def test_statistics_far_from_zero(name: str, dtypes: Dtypes, mean: float, backend: str) -> None:
    """z has the given mean and a standard deviation of about 1."""
    call = stem_call(case(name), dtypes, training=True)
    call = call.with_options(padding=0, momentum=1.0)
    taps = call.tensors["weight"][0].numel()
    weight = call.tensors["weight"].abs() + 0.1
    weight /= weight.sum((1, 2, 3), keepdim=True)
    call = call.with_tensors(x=(call.x * taps**0.5 + mean).to(dtypes.x), weight=weight)
    actual = check(call, backend, wanted=())
    assert abs(actual["running_mean"].mean() - mean) < 0.2
    assert 0.5 < actual["running_var"].mean() < 2


@ANY_DTYPE
@MODES
@pytest.mark.parametrize("place", ["x", "weight", "bn_weight", "bn_bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf(place: str, value: float, training: bool, dtypes: Dtypes) -> None:
    call = stem_call(case("unread_border"), dtypes, training)
    spoiled = call.tensors[place].clone()
    spoiled[(1, 1, 2, 2) if spoiled.dim() == 4 else 5] = value
    call = call.with_tensors(**{place: spoiled})
    check(call, "cpu", wanted=())
    if value != value:
        check(call, "cpu")


@ANY_BACKEND
@pytest.mark.parametrize("name", ["out_odd", "same_even", "k7_out_gt_group", "stride_3_four_sides"])
def test_an_infinite_weight_counts_inside_of_the_image_alone(name: str, backend: str) -> None:
    """Its products with the padding are nothing, not NaN."""
    stem = case(name)
    call = stem_call(stem)
    call = call.with_tensors(x=call.x.abs() + 0.1)
    corner = 0 if stem.padding[0] else -1  # where some outputs meet the padding
    results = []
    for value in (0.0, float("inf")):
        weight = call.tensors["weight"].clone()
        weight[1, 0, corner, corner] = value
        results.append(run(call.with_tensors(weight=weight), backend, wanted=())["y"])
    tap = torch.zeros(1, 1, stem.k, stem.k)
    tap[..., corner, corner] = 1
    image = F.pad(torch.ones(1, 1, stem.h, stem.w), stem.padding)
    met = torch.zeros_like(results[0], dtype=torch.bool)
    met[:, 1] = F.conv2d(image, tap, stride=stem.stride)[:, 0] > 0
    assert 0 < met[0, 1].sum() < met[0, 1].numel()
    assert not results[1][met].isfinite().any()
    assert torch.equal(results[0][~met], results[1][~met])


@pytest.mark.parametrize("training", [False, True])
def test_nan_in_grad_y(training: bool) -> None:
    call = stem_call(case("unread_border"), FP32, training)
    grad_y = torch.ones_like(run(call, wanted=())["y"])
    grad_y[1, 2, 1, 1] = float("nan")
    actual = check(call, "cpu", grad_y=grad_y)
    assert actual["grad weight"][2].isnan().all()
    assert actual["grad weight"][3].isfinite().all()


@MODES
def test_gradients_of_gradients(training: bool) -> None:
    """A penalty on the gradients is that of the reference, bit by bit, and moves nothing."""
    results = []
    for backend in ("cpu", "reference"):
        call = stem_call(case("out_odd"), FP32, training)
        tensors = {k: v.clone() for k, v in call.tensors.items()}
        leaves = [tensors[k].requires_grad_() for k in call.differentiable]
        y = ops.stem_conv_bn_silu(**tensors, **call.options, backend=backend)
        first = torch.autograd.grad(y, leaves, torch.ones_like(y), create_graph=True)
        moved = tensors["running_mean"].clone()
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        assert torch.equal(tensors["running_mean"], moved)
        results.append(dict(enumerate((*first, *second))))
    for a, b in zip(results[0].values(), results[1].values(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_gradient_of_a_gradient_is_the_kernels() -> None:
    """Without create_graph the kernels run, not the reference."""
    call = stem_call(case("out_odd"), FP32, training=True)
    with pytest.raises(AssertionError):
        assert_same(run(call, "cpu"), run(call))
    assert_same(run(call, "auto"), run(call, "cpu"))


@ANY_BACKEND
def test_one_value_per_channel(backend: str) -> None:
    call = stem_call(StemCase("one_value", 1, 3, 5, 2, 2), FP32, training=True)
    for wanted in (None, ()):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            run(call, backend, wanted=wanted)


def test_bad_arguments() -> None:
    call = stem_call(case("out_odd"))
    for changed, message in (
        ({"weight": torch.zeros(8, 3, 3, 3)}, r"with Cin = 4 as in x, got \[8, 3, 3, 3\]"),
        ({"weight": torch.zeros(8, 4, 3, 5)}, r"got \[8, 4, 3, 5\]"),
        ({"bn_bias": torch.zeros(3)}, r"bn_bias must have shape \[21\], got \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            run(call.with_tensors(**changed), "cpu", wanted=())
    with pytest.raises(ValueError, match="stride must be an int of at least 1, got 0"):
        run(call.with_options(stride=0), "cpu", wanted=())
    with pytest.raises(ValueError, match="smaller than the 3x3 kernel"):
        run(call.with_tensors(x=call.x[:, :, :1, :1]).with_options(padding=0), "cpu", wanted=())
    with pytest.raises(RuntimeError, match=r"cannot run stem_conv_bn_silu: x is torch\.float64"):
        run(call, "cpu", double=True, wanted=())
    assert run(call, "auto", double=True)["y"].dtype == torch.float64


def test_autocast_casts_the_image() -> None:
    call = stem_call(case("out_odd"), training=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(call, "cpu", wanted=("weight",))
    assert actual["y"].dtype == torch.bfloat16
    assert actual["grad weight"].dtype == torch.float32
    cast = run(call.with_tensors(x=call.x.bfloat16()), "cpu", wanted=("weight",))
    assert_same(actual, cast)


def test_sizes_are_guarded() -> None:
    x, weight = torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 3, 3)
    none: Any = (None,) * 4
    with pytest.raises(ValueError, match=r"padding is \[-1\], allowed are 0 to"):
        conv_op(x, weight, *none, (2, 2), (-1, 1, 1, 1), 1e-5, "cpu")


def test_defaults() -> None:
    call = stem_call(case("c_eq_vector"))
    y = ops.stem_conv_bn_silu(**call.tensors)
    assert torch.equal(y, run(call, "cpu", wanted=())["y"])
    assert isinstance(y, Tensor)
