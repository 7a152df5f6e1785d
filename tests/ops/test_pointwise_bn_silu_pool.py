"""pointwise_bn_silu_pool with and without gradients and batch statistics, against the reference."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import tiers
from cases import HEAD_CASES, LARGE_HEAD_CASES, PointwiseCase, find
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
    head_call,
    matrix,
    random_like,
    run,
    threaded,
)

module = importlib.import_module("effnet_fast.ops.pointwise_bn_silu_pool")
case = functools.partial(find, HEAD_CASES)
ANY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
ANY_DTYPE = pytest.mark.parametrize("dtypes", [FP32, BF16], ids=str)


@functools.lru_cache(maxsize=4)
def expectation(case: PointwiseCase, dtypes: Dtypes, training: bool) -> tuple[Any, ...]:
    """The call, and its results in stock's arithmetic and in float64."""
    call = head_call(case, dtypes, training)
    return call, run(call), run(call, double=True)


@matrix(HEAD_CASES, DTYPES, tiers.PRODUCT_SETS)
@MODES
def test_matches_reference(
    training: bool, case: PointwiseCase, dtypes: Dtypes, backend: str
) -> None:
    call, stock, exact = expectation(case, dtypes, training)
    before = call.x.clone()
    assert_parity(run(call, backend), stock, exact, dtypes.x)
    assert torch.equal(call.x, before)


@matrix(LARGE_HEAD_CASES, (FP32, BF16), ("cpu",))
def test_matches_reference_where_large(case: PointwiseCase, dtypes: Dtypes, backend: str) -> None:
    check(head_call(case, dtypes, True), backend)


@MODES
@ANY_DTYPE
@pytest.mark.parametrize("name", ["c_odd", "one_pixel", "batch_0"])
def test_without_gradients(name: str, dtypes: Dtypes, training: bool) -> None:
    call = head_call(case(name), dtypes, training)
    actual = check(call, "cpu", wanted=())
    if training:
        assert_same(actual, run(call, "cpu"))


@MODES
@pytest.mark.parametrize(
    "absent",
    [["bn_weight"], ["bn_weight", "bn_bias"], ["running_mean", "running_var"]],
    ids="+".join,
)
def test_absent_vectors(absent: list[str], training: bool) -> None:
    if "running_mean" in absent and not training:
        pytest.skip("eval needs them")
    check(head_call(case("c_odd"), FP32, training).with_tensors(**dict.fromkeys(absent)), "cpu")


def test_momentum_and_eps() -> None:
    call = head_call(case("c_odd"), training=True)
    for momentum, eps in ((0.01, 1e-3), (0.5, 0.5), (1.0, 1e-5)):
        check(call.with_options(momentum=momentum, eps=eps), "cpu")


@MODES
@ANY_DTYPE
def test_what_is_wanted_changes_no_bits(dtypes: Dtypes, training: bool) -> None:
    call = head_call(case("c_odd"), dtypes, training)
    full = run(call, "cpu")
    for wanted in (*([name] for name in call.differentiable), ["x", "bn_bias"]):
        assert_same(run(call, "cpu", wanted=wanted), full)


def test_products_that_nothing_wants_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[bool]] = []
    original = module.backward_op
    monkeypatch.setattr(module, "backward_op", lambda *a: asked.append(a[-3]) or original(*a))
    call = head_call(case("c_odd"), training=True)
    for wanted in (["x"], ["weight", "bn_weight"], ["bn_weight"], ["bn_bias"]):
        run(call, "cpu", wanted=wanted)
    assert asked == [[True, False], [False, True]]


@threaded(HEAD_CASES, ("c_eq_vector", "c_odd", "out_gt_tile", "hw_gt_part", "batch_0", "b0_head"))
def test_any_number_of_threads(case: PointwiseCase, dtypes: Dtypes, backend: str) -> None:
    call = head_call(case, dtypes, True)
    expected = run(call, backend)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_same(run(call, backend), expected)


@MODES
@ANY_DTYPE
@pytest.mark.parametrize("place", ["x", "weight", "grad_y"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_inf_are_not_hidden(
    value: float, place: str, dtypes: Dtypes, training: bool
) -> None:
    call = head_call(case("c_eq_vector"), dtypes, training)
    grad_y = random_like(run(call, wanted=())["y"])
    tensor = grad_y if place == "grad_y" else call.tensors[place].clone()
    tensor[tuple(size // 2 for size in tensor.shape)] = value
    if place != "grad_y":
        call = call.with_tensors(**{place: tensor})
    actual, stock = run(call, "cpu", grad_y=grad_y), run(call, grad_y=grad_y)
    assert any(not tensor.isfinite().all() for tensor in stock.values())
    for name, tensor in stock.items():
        hidden = actual[name].isfinite() & ~tensor.isfinite()
        assert not hidden.any(), f"{name}: {int(hidden.sum())} finite, stock's are not"


FAULTS = {
    "expand": lambda results: results[0].mul_(1.001),
    "pooled": lambda results: results[0].mul_(1.001),
    "slopes": lambda results: results[1].mul_(1.001),
    "grad_x": lambda results: results[0].mul_(1.001),
    "grad_weight": lambda results: results[1].mul_(1.001),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_parity_notices_a_result_that_is_off_by_a_thousandth(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = head_call(case("c_eq_vector"), training=True)
    passes = module.passes("cpu")
    names = {"expand": "expand", "pooled": "squeeze", "slopes": "squeeze"}
    owner, name = (passes, names[fault]) if fault in names else (module, "backward_op")
    right = getattr(owner, name)

    def off(*args: Any) -> Any:
        results = right(*args)
        FAULTS[fault](results)
        return results

    monkeypatch.setattr(owner, name, off)
    with pytest.raises(AssertionError, match="error"):
        check(call, "cpu")


def test_parity_notices_swapped_channels() -> None:
    call, stock, exact = expectation(case("b0_head"), FP32, True)
    weight = call.tensors["weight"].clone()
    weight[[0, 3]] = weight[[3, 0]]
    actual = run(call.with_tensors(weight=weight), "cpu")
    with pytest.raises(AssertionError, match="y: rms error"):
        assert_parity(actual, stock, exact, torch.float32)


def saved(call: Call, backend: str) -> int:
    """Elements that one call keeps for backward, the arguments aside."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    tensors = {k: v.clone().requires_grad_() for k, v in call.tensors.items()}
    tensors |= {k: v.detach() for k, v in tensors.items() if k.startswith("running")}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        function = getattr(ops, call.op)
        y = function(**tensors, **call.options, backend=backend)
    assert y.requires_grad
    arguments = {tensor.data_ptr() for tensor in tensors.values()}
    return sum(size for at, size in kept.items() if at not in arguments)


def test_one_image_is_kept() -> None:
    call = head_call(case("hw_gt_part"), training=True)
    n, _, h, w = call.x.shape
    image = n * call.tensors["weight"].shape[0] * h * w
    assert image < saved(call, "cpu") < 1.05 * image
    assert saved(call, "reference") > 2 * image


def test_one_value_per_channel_is_refused() -> None:
    call = head_call(case("one_pixel"), training=True)
    call = call.with_tensors(x=call.x[:1])
    words = r"Expected more than 1 value per channel .* torch\.Size\(\[1, 24, 1, 1\]\)"
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match=words):
            run(call, backend)


def test_auto_takes_the_kernels() -> None:
    results: list[Results] = []
    for training in (False, True):
        call = head_call(case("c_odd"), training=training)
        results += [run(call, "auto"), run(call, "cpu")]
        assert not torch.equal(results[-1]["grad weight"], run(call)["grad weight"])
    assert_same(results[0], results[1])
    assert_same(results[2], results[3])


@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_strides_of_grad_y(layout: str) -> None:
    call = head_call(case("c_odd"), training=True)
    y = run(call, "cpu", wanted=())["y"]
    grad_y = random_like(y[:1]).expand_as(y) if layout == "expanded" else random_like(y.t()).t()
    dense = run(call, "cpu", grad_y=grad_y.contiguous())
    assert_same(run(call, "cpu", grad_y=grad_y), dense)


def test_slopes_that_cancel_each_other() -> None:
    """Those of two pixels may add up to 0 and say nothing of the sum with zh."""
    q, slopes = torch.full((1, 1), 2.0), torch.tensor([[[0.0]], [[3.0]]])
    assert torch.equal(module.backward_sums(q, slopes), torch.tensor([[0.0], [6.0]]))
