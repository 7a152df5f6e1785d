"""The MBConv op with gradients and batch statistics, against the reference."""

from __future__ import annotations

import functools
import importlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiers
from cases import LARGE_MBCONV_CASES, MBCONV_CASES, MBConvCase, find
from effnet_fast import ops, reference, use_backend
from effnet_fast.backends import native
from effnet_fast.ops import mbconv_passes
from effnet_fast.ops.norms import MEAN, VAR
from effnet_fast.reference.mbconv import Training
from mbconv_blocks import BlockCall, block_call, params_of, run
from parity import (
    BF16,
    DTYPES,
    FP32,
    Dtypes,
    assert_parity,
    assert_same,
    matrix,
    nchw_copy,
    random_like,
    runs,
    threaded,
)

SAMPLES = ("c_odd_stride_2", "no_expansion_residual", "c_eq_vector", "k7")
ANY_RUN = runs((FP32, BF16), tiers.PRODUCT_SETS)
ANY_SAMPLE = pytest.mark.parametrize("name", SAMPLES)


def run_op(call: BlockCall, backend: str = "cpu", **options: Any) -> dict[str, Tensor]:
    return run(call, ops.mbconv, backend=backend, **options)


def sample(
    name: str, dtypes: Dtypes = FP32, training: Training = True, **options: Any
) -> BlockCall:
    return block_call(find(MBCONV_CASES, name), dtypes, training, **options)


def check(call: BlockCall, backend: str = "cpu") -> None:
    assert_parity(run_op(call, backend), run(call), run(call, double=True), call.x.dtype)


@functools.lru_cache(maxsize=4)
def expectation(case: MBConvCase, dtypes: Dtypes, training: bool) -> tuple[Any, ...]:
    call = block_call(case, dtypes, training, dropped=True)
    return call, run(call), run(call, double=True)


@matrix(MBCONV_CASES, DTYPES, tiers.PRODUCT_SETS)
def test_matches_reference(case: MBConvCase, dtypes: Dtypes, backend: str) -> None:
    call, stock, exact = expectation(case, dtypes, True)
    before = call.x.clone()
    assert_parity(run_op(call, backend), stock, exact, dtypes.x)
    assert torch.equal(call.x, before)


@matrix(LARGE_MBCONV_CASES, (FP32, BF16), ("cpu",))
def test_matches_reference_where_large(case: MBConvCase, dtypes: Dtypes, backend: str) -> None:
    call, stock, exact = expectation(case, dtypes, True)
    assert_parity(run_op(call, backend), stock, exact, dtypes.x)


@ANY_RUN
@ANY_SAMPLE
def test_gradients_in_eval(name: str, dtypes: Dtypes, backend: str) -> None:
    call, stock, exact = expectation(find(MBCONV_CASES, name), dtypes, False)
    assert_parity(run_op(call, backend), stock, exact, dtypes.x)


@pytest.mark.parametrize("index", range(1, 7))
def test_any_mixture_of_training_and_eval(index: int) -> None:
    check(sample("c_eq_vector", training=tuple(bool(index >> bit & 1) for bit in range(3))))


def without(*names: str) -> Any:
    def change(call: BlockCall) -> BlockCall:
        gone = dict.fromkeys(n for n in call.tensors if n.endswith(names))
        return replace(call, tensors=call.tensors | gone)

    return change


@ANY_SAMPLE
@pytest.mark.parametrize(
    "change",
    [
        without("bn_weight", "bn_bias"),
        without("reduce_bias", "expand_bias"),
        without("running_mean", "running_var"),
    ],
    ids=["affine", "biases", "statistics"],
)
def test_absent_parameters(name: str, change: Any) -> None:
    check(change(sample(name)))


@pytest.mark.parametrize("padding", [(0, 1, 0, 1), (1, 2, 1, 2), (3, 0, 1, 4), 0, 6], ids=str)
@pytest.mark.parametrize("name", ["c_odd_stride_2", "no_expansion"])
def test_padding(name: str, padding: Any) -> None:
    check(sample(name, padding=padding))


@ANY_RUN
@ANY_SAMPLE
def test_lean_gives_the_same_bits(name: str, dtypes: Dtypes, backend: str) -> None:
    call = sample(name, dtypes)
    assert_same(run_op(replace(call, memory="lean"), backend), run_op(call, backend))


@ANY_SAMPLE
@pytest.mark.parametrize("dtypes", [FP32, BF16], ids=str)
def test_what_is_wanted_changes_no_bits(dtypes: Dtypes, name: str) -> None:
    call = sample(name, dtypes, dropped=True)
    full = run_op(call)
    for wanted in call.differentiable:
        assert_same(run_op(call, wanted=[wanted]), full)
    assert_same(run_op(call, wanted=()), full)


@threaded(
    MBCONV_CASES,
    ("c_eq_vector", "c_odd_stride_2", "no_expansion", "k7", "batch_0", "b0_c40_40_28_k5_s1"),
)
def test_any_number_of_threads(case: MBConvCase, dtypes: Dtypes, backend: str) -> None:
    call = block_call(case, dtypes)
    expected = run_op(call, backend)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_same(run_op(call, backend), expected)


@pytest.mark.slow
def test_callers_in_several_threads() -> None:
    """Eight at once, which share the cores, with calls on one and on several threads."""
    calls = [sample(n, d, training=t) for n in SAMPLES for d in (FP32, BF16) for t in (True, False)]
    expected = [run_op(call) for call in calls]

    def work(start: int) -> None:
        torch.set_num_threads(1 + start % 3)
        for step in range(len(calls)):
            index = (start * 3 + step) % len(calls)
            assert_same(run_op(calls[index]), expected[index])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert native.load().running_calls() == 0


def test_a_gate_without_a_norm_is_refused() -> None:
    """The kernel would leave it out."""
    x, weight = torch.zeros(1, 4, 2, 2), torch.zeros(4, 4)
    gate, z, norm = torch.ones(1, 4), torch.zeros(1, 4, 2, 2), torch.zeros(5, 4)
    tensors = x.data_ptr(), 0, gate.data_ptr(), weight.data_ptr()
    rest = (0, 0, 0, 0), 1e-5, z.data_ptr(), norm.data_ptr(), (0, 0.0, 0.0), 1
    with pytest.raises(ValueError, match="a gate needs the norm of x"):
        native.load().mbconv_pointwise("", (1, 4, 4, 4), False, False, *tensors, *rest)


@ANY_RUN
@ANY_SAMPLE
def test_two_runs(name: str, dtypes: Dtypes, backend: str) -> None:
    call = sample(name, dtypes, dropped=True)
    assert_same(run_op(call, backend), run_op(call, backend))


@ANY_SAMPLE
def test_layouts(name: str) -> None:
    """A sliced x, and gradients of the output in NCHW order or expanded from a number."""
    call = sample(name)
    n, c, h, w = call.x.shape
    wide = torch.zeros(n, c, h + 3, w + 2).contiguous(memory_format=torch.channels_last)
    sliced = wide[:, :, 1 : h + 1, 2:]
    sliced.copy_(call.x)
    expected = run_op(call)
    assert_same(run_op(call.with_tensors(x=sliced)), expected)
    x = call.x.detach().requires_grad_()
    y = ops.mbconv(x, params_of(call.tensors), call.config, training=True, backend="cpu")
    grad_y = random_like(y).contiguous()
    assert torch.equal(torch.autograd.grad(y, x, grad_y, retain_graph=True)[0], expected["grad x"])
    ones = torch.autograd.grad(y, x, torch.ones(()).expand(y.shape), retain_graph=True)[0]
    assert torch.equal(ones, torch.autograd.grad(y, x, torch.ones_like(y))[0])


@ANY_RUN
@ANY_SAMPLE
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_saved_tensors_that_come_back_in_another_layout(
    name: str, dtypes: Dtypes, memory: str, backend: str
) -> None:
    """As hooks that offload them may give them back: NCHW without gaps."""
    call = sample(name, dtypes, dropped=True, memory=memory)
    with torch.autograd.graph.saved_tensors_hooks(nchw_copy, lambda saved: saved):
        actual = run_op(call, backend)
    assert_same(actual, run_op(call, backend))


@pytest.mark.parametrize("place", ["x", "expand.weight", "depthwise.weight", "project.bn_bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_propagate(place: str, value: float) -> None:
    """Batch statistics carry one to all of a channel; nothing finite may be made of it."""
    call = sample("c_eq_vector")
    tensor = call.tensors[place].clone()
    tensor[(0,) * tensor.dim()] = value
    call = replace(call, tensors=call.tensors | {place: tensor})
    actual, stock = run_op(call), run(call)
    assert torch.equal(actual["y"].isfinite(), stock["y"].isfinite())
    assert_none_hidden(actual, stock)


def assert_none_hidden(actual: dict[str, Tensor], stock: dict[str, Tensor]) -> None:
    """Asserts that nothing is finite where stock's is not."""
    assert list(actual) == list(stock)
    assert any(not tensor.isfinite().all() for tensor in stock.values())
    for name, tensor in stock.items():
        hidden = actual[name].isfinite() & ~tensor.isfinite()
        assert not hidden.any(), f"{name}: {int(hidden.sum())} finite, stock's are not"


@ANY_RUN
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("place", ["x", "grad_y", "depthwise.weight", "project.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ["c_eq_vector", "c_odd_stride_2", "no_expansion_residual"])
def test_nan_and_inf_reach_gradients(
    name: str, value: float, place: str, dtypes: Dtypes, training: bool, backend: str
) -> None:
    call = sample(name, dtypes, training)
    grad_y = random_like(run(call, wanted=())["y"])
    tensor = grad_y if place == "grad_y" else call.tensors[place].clone()
    tensor[tuple(size // 2 for size in tensor.shape)] = value
    if place != "grad_y":
        call = replace(call, tensors=call.tensors | {place: tensor})
    assert_none_hidden(run_op(call, backend, grad_y=grad_y), run(call, grad_y=grad_y))


def test_gradients_of_gradients() -> None:
    call = sample("no_expansion_residual", dropped=True)

    def penalty(function: Any, **options: Any) -> list[Tensor]:
        names = [n for n in call.differentiable if n != "x"]
        tensors = {k: None if t is None else t.clone() for k, t in call.tensors.items()}
        inputs = [tensors[name].requires_grad_() for name in ("x", *names)]
        y = function(
            tensors["x"], params_of(tensors), call.config, training=True,
            row_scale=tensors["row_scale"], **options,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
        return list(torch.autograd.grad(grad.square().sum(), inputs, allow_unused=True))

    actual, stock = penalty(ops.mbconv, backend="cpu"), penalty(reference.mbconv)
    for a, b in zip(actual, stock, strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * float(b.abs().max()))


@ANY_RUN
@pytest.mark.parametrize("name", ["expand", "depthwise"])
def test_statistics_are_those_of_stored_values(name: str, dtypes: Dtypes, backend: str) -> None:
    """Rounded, as the pass after it reads them."""
    x = torch.randn(2, 24, 9, 8).add(3).to(dtypes.x).contiguous(memory_format=torch.channels_last)
    passes, vectors = mbconv_passes.passes(backend), (None, None, None, None)
    if name == "expand":
        z, norm = passes.expand(x, (torch.randn(40, 24, 1, 1) / 5).to(dtypes.x), *vectors, 1e-5)
    else:
        weight = torch.rand(24, 1, 3, 3).to(dtypes.x)
        z, norm = passes.depthwise(x, None, weight, *vectors, 1, (1, 1, 1, 1), 1e-5, "silu")
    var, mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(norm[MEAN].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm[VAR].double(), var, rtol=1e-5, atol=0)


def none(*_: Any) -> None:
    """In the place of what runs all passes at once."""


PASSES = [name for name in vars(mbconv_passes.passes("cpu")) if name != "finish"]


@pytest.mark.parametrize("name", PASSES)
def test_parity_notices_a_pass_that_is_off_by_a_thousandth(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = sample("c_eq_vector")
    passes = mbconv_passes.passes("cpu")
    right = getattr(passes, name)
    monkeypatch.setattr(importlib.import_module("effnet_fast.ops.mbconv"), "_in_one_call", none)

    def off(*args: Any) -> Any:
        results = right(*args)
        for tensor in (results,) if isinstance(results, Tensor) else results[-2:]:
            tensor.mul_(1.001)
        return results

    monkeypatch.setattr(passes, name, off)
    with pytest.raises(AssertionError, match="error"):
        check(call)


@pytest.mark.parametrize("name", ["expand", "depthwise", "project"])
def test_parity_notices_swapped_channels(name: str) -> None:
    call = sample("c_eq_vector")
    weight = call.tensors[f"{name}.weight"].clone()
    weight[[0, 3]] = weight[[3, 0]]
    wrong = replace(call, tensors=call.tensors | {f"{name}.weight": weight})
    with pytest.raises(AssertionError, match="rms error"):
        assert_parity(run_op(wrong), run(call), run(call, double=True), torch.float32)


def test_a_named_backend_says_what_it_cannot_run() -> None:
    call = sample("c_eq_vector")
    arguments = (params_of(call.tensors), call.config)
    with pytest.raises(RuntimeError, match="the cpu backend takes channels_last"):
        ops.mbconv(call.x.contiguous(), *arguments, training=True, backend="cpu")
    with pytest.raises(ValueError, match="memory must be one of fast, lean"):
        ops.mbconv(call.x, *arguments, training=True, memory="small")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradient_of_row_scale(training: bool) -> None:
    """The reference's: "auto" takes that, a named backend says so."""
    call = sample("c_eq_vector", training=training, dropped=True)
    wanted = (*call.differentiable, "row_scale")
    actual = run_op(call, "auto", wanted=wanted)
    assert "grad row_scale" in actual
    assert_same(actual, run(call, wanted=wanted))
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run mbconv.*row_scale requires a grad"):
        run_op(call, "cpu", wanted=wanted)
    with use_backend("cpu"), pytest.raises(RuntimeError, match="row_scale requires a gradient"):
        run_op(call, "auto", wanted=["row_scale"])
    with use_backend("reference"):
        assert_same(run_op(call, "auto", wanted=wanted), actual)


def test_one_value_per_channel_is_refused() -> None:
    call = sample("one_pixel")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        run_op(call.with_tensors(x=call.x[:1]))


@pytest.mark.parametrize("training", [False, True])
def test_double_goes_to_the_reference(training: bool) -> None:
    call = sample("c_eq_vector", training=training)
    assert_same(run(call, ops.mbconv, double=True), run(call, double=True))
