"""Every activation and gate, and blocks without squeeze-excite, against the reference."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from activation_calls import INF, NAN, kinds_of, one_pixel, special
from bounds import assert_over, draws
from cases import MBCONV_CASES, find
from effnet_fast import ops, reference
from effnet_fast.reference.activations import ACTIVATIONS
from mbconv_blocks import BlockCall, block_call, params_of
from mbconv_blocks import run as run_block
from parity import (
    BF16,
    FP32,
    SAMPLES,
    Call,
    Dtypes,
    assert_parity,
    assert_same,
    channels_last,
    random_like,
    run,
    sample,
    with_gradients,
)
from second_derivatives import second_derivatives
from tiers import AVAILABLE
from tolerances import assert_same_places

OTHERS = [name for name in ACTIVATIONS if name != "silu"]
# tests/csrc runs the kernels of every set with every activation.
ANY_RUN = pytest.mark.parametrize(
    ("dtypes", "backend"),
    [
        (FP32, "cpu"),
        pytest.param(BF16, "cpu", marks=pytest.mark.slow),
        *(pytest.param(FP32, name, marks=pytest.mark.exhaustive) for name in AVAILABLE[:2]),
    ],
    ids=str,
)
ANY_ACTIVATION = pytest.mark.parametrize("activation", OTHERS)
TRAINING = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def redrawn(call: Call, seed: int) -> Call:
    """With other random images."""
    x = torch.randn(call.x.shape, generator=torch.Generator().manual_seed(seed))
    return call.with_tensors(x=channels_last(x.to(call.x)))


def check(call: Call, backend: str, wanted: tuple[str, ...] | None = None) -> None:
    """Holds an op to the rule of parity, over several draws of its images."""
    exactly = functools.partial(run, double=True, wanted=())
    calls = draws(functools.partial(redrawn, call), exactly)
    tested = functools.partial(run, backend=backend, wanted=wanted)
    assert_over(calls, tested, functools.partial(run, wanted=wanted))


@ANY_RUN
@ANY_ACTIVATION
def test_ops(activation: str, dtypes: Dtypes, backend: str) -> None:
    """Outputs, gradients and statistics of each op and mode, with and without gradients."""
    for name in (*SAMPLES, "head_eval"):
        call = sample(name, dtypes)
        for kinds in kinds_of(call, activation):
            given = call.activated(**kinds)
            check(given, backend, with_gradients(call))
            if with_gradients(call) is None and not call.options.get("training"):
                check(given, backend, ())


@ANY_RUN
def test_the_gate_of_squeeze_excite(dtypes: Dtypes, backend: str) -> None:
    call = sample("squeeze_excite", dtypes).activated(activation="silu", gate="hardsigmoid")
    check(call, backend)


@pytest.mark.parametrize("name", SAMPLES)
def test_parity_notices_another_activation(name: str) -> None:
    """And the default is SiLU."""
    call, wanted = sample(name), with_gradients(sample(name))
    default = "identity" if call.op == "pointwise_bn_act" else "silu"
    for activation in ACTIVATIONS:
        given = replace(call, options=call.activated(activation=activation).options)
        if activation == default:
            assert_same(run(call, "cpu", wanted=wanted), run(given, "cpu", wanted=wanted))
            continue
        results = run(given, "cpu", wanted=wanted), run(call, wanted=wanted)
        with pytest.raises(AssertionError, match="error"):
            assert_parity(*results, run(call, double=True, wanted=wanted), torch.float32)


@ANY_RUN
@ANY_ACTIVATION
@pytest.mark.parametrize("op", ["dwconv_bn_silu", "stem_conv_bn_silu", "pointwise_bn_silu_pool"])
def test_at_the_bounds(op: str, activation: str, dtypes: Dtypes, backend: str) -> None:
    """Values and slopes of x are PyTorch's own: 0 on a bound."""
    call = one_pixel(op, special(dtypes.x), activation)
    ones = torch.ones_like(reference_of(call))
    actual, stock = (run(call, name, wanted=["x"], grad_y=ones) for name in (backend, None))
    plain = run(call, backend, wanted=())
    for ours, theirs in ((actual["y"], stock["y"]), (plain["y"], stock["y"])):
        assert_same_places(ours, theirs)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    slope = stock["grad x"]
    finite = call.x.isfinite()  # beyond, BatchNorm's own gradient has products of 0 and infinity
    torch.testing.assert_close(actual["grad x"][finite], slope[finite])


def reference_of(call: Call) -> Tensor:
    return run(call, wanted=())["y"]


@ANY_RUN
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@ANY_ACTIVATION
def test_gradients_that_are_no_numbers(
    activation: str, value: float, dtypes: Dtypes, backend: str
) -> None:
    """Nothing finite is made of what stock's gradients have."""
    for name in ("dwconv_eval", "dwconv_train", "stem_eval", "head_eval"):
        call = sample(name, dtypes).activated(activation=activation)
        grad_y = random_like(reference_of(call))
        grad_y[(0,) * grad_y.dim()] = value
        actual, stock = (run(call, b, grad_y=grad_y) for b in (backend, None))
        for key, tensor in stock.items():
            assert not (actual[key].isfinite() & ~tensor.isfinite()).any(), f"{name}: {key}"


@ANY_RUN
@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
@pytest.mark.parametrize("name", ["dwconv_train", "stem_train", "stem_eval", "head_eval"])
def test_infinite_gradients_where_nothing_passes(
    name: str, activation: str, dtypes: Dtypes, backend: str
) -> None:
    """As of sqrt(relu(u)): stock drops an infinite gradient where the activation is constant."""
    call = sample(name, dtypes).activated(activation=activation)
    channels = call.tensors["bn_bias"].shape[0]
    bias = call.tensors["bn_bias"].clone()
    bias[: channels // 2] = -100.0
    call = call.with_tensors(bn_bias=bias)
    grad_y = random_like(reference_of(call))
    grad_y[:, : channels // 2] = INF
    actual, stock = (run(call, b, grad_y=grad_y) for b in (backend, None))
    for key, tensor in stock.items():
        assert_same_places(actual[key], tensor)
        assert tensor.isfinite().all(), key


BLOCKS: list[dict[str, Any]] = [
    *({"activation": name, "squeeze": False} for name in ACTIVATIONS),
    *({"activation": name, "se_activation": name} for name in OTHERS),
    {"activation": "hardswish", "se_activation": "relu", "gate": "hardsigmoid"},
    {"activation": "relu6", "se_activation": "relu6", "gate": "hardsigmoid"},
    {"activation": "silu", "se_activation": "identity", "gate": "hardsigmoid"},
]
ANY_BLOCK = pytest.mark.parametrize(
    "kinds", BLOCKS, ids=lambda kinds: "-".join(map(str, kinds.values()))
)
SHAPES = ("c_odd_stride_2", "no_expansion_residual", "c_eq_vector")


def block(name: str, dtypes: Dtypes = FP32, training: Any = True, **options: Any) -> BlockCall:
    return block_call(find(MBCONV_CASES, name), dtypes, training, **options)


def blocks(name: str, dtypes: Dtypes = FP32, training: Any = True, **kinds: Any) -> Any:
    """The block from several seeds."""

    def make(seed: int) -> BlockCall:
        return block(name, dtypes, training, seed=seed, **kinds)

    return draws(make, functools.partial(run_block, double=True, wanted=()))


def run_op(call: BlockCall, backend: str = "cpu", **options: Any) -> dict[str, Tensor]:
    return run_block(call, ops.mbconv, backend=backend, **options)


def check_blocks(calls: Any, backend: str = "cpu", **options: Any) -> None:
    tested = functools.partial(run_op, backend=backend, **options)
    assert_over(calls, tested, functools.partial(run_block, **options))


@ANY_RUN
@TRAINING
@ANY_BLOCK
def test_blocks(kinds: dict[str, Any], training: bool, dtypes: Dtypes, backend: str) -> None:
    for name in SHAPES if dtypes is FP32 else SHAPES[:2]:
        calls = blocks(name, dtypes, training, dropped=name == "c_eq_vector", **kinds)
        check_blocks(calls, backend)
        if not training and name != "c_eq_vector":  # one call, without what training keeps
            check_blocks(calls, backend, wanted=())


@ANY_BLOCK
def test_lean_blocks_give_the_same_bits(kinds: dict[str, Any]) -> None:
    call = block("c_odd_stride_2", **kinds)
    assert_same(run_op(replace(call, memory="lean")), run_op(call))


@pytest.mark.parametrize("index", range(1, 7))
def test_any_mixture_of_training_and_eval_without_squeeze_excite(index: int) -> None:
    modes = tuple(bool(index >> bit & 1) for bit in range(3))
    check_blocks(blocks("c_eq_vector", training=modes, activation="relu6", squeeze=False))


def test_what_is_wanted_changes_no_bits_without_squeeze_excite() -> None:
    call = block("c_odd_stride_2", activation="relu6", squeeze=False, dropped=True)
    full = run_op(call)
    for wanted in call.differentiable:
        assert_same(run_op(call, wanted=[wanted]), full)


@pytest.mark.slow
@ANY_BLOCK
def test_any_number_of_threads(kinds: dict[str, Any]) -> None:
    call = block("c_gt_tile", **kinds)
    expected = run_op(call)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same(run_op(call), expected)


def test_parity_notices_another_activation_in_a_block() -> None:
    for kinds in ({"squeeze": False}, {"se_activation": "relu", "gate": "hardsigmoid"}):
        call = block("c_eq_vector", activation="relu6", **kinds)
        for change in ({"activation": "relu"}, {"se_activation": "silu"}, {"gate": "sigmoid"}):
            if "squeeze" in kinds and "activation" not in change:
                continue
            other = replace(call, config=replace(call.config, **change))
            with pytest.raises(AssertionError, match="error"):
                assert_parity(run_op(other), run_block(call), run_block(call, double=True))


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@TRAINING
@ANY_BLOCK
def test_nan_and_inf_of_blocks(kinds: dict[str, Any], training: bool, value: float) -> None:
    call = block("c_eq_vector", FP32, training, **kinds)
    for place in ("x", "grad_y"):
        grad_y = random_like(run_block(call, wanted=())["y"])
        tensor = grad_y if place == "grad_y" else call.x.clone()
        tensor[1, 3, 2, 2] = value
        given = call if place == "grad_y" else call.with_tensors(x=tensor)
        actual, stock = run_op(given, grad_y=grad_y), run_block(given, grad_y=grad_y)
        for name, expected in stock.items():
            hidden = actual[name].isfinite() & ~expected.isfinite()
            assert not hidden.any(), f"{place}, {name}"


@pytest.mark.parametrize("name", ["dwconv_train", "stem_eval", "squeeze_excite", "head_train"])
@pytest.mark.parametrize("activation", ["relu6", "hardswish"])
def test_second_derivative(activation: str, name: str) -> None:
    kinds = {"activation": activation}
    kinds |= {"gate": "hardsigmoid"} if name == "squeeze_excite" else {}
    call = sample(name).activated(**kinds)
    actual, stock = (second_derivatives(call, b, penalty=False) for b in ("cpu", "reference"))
    double = call.with_tensors(**{k: v.double() for k, v in call.tensors.items()})
    assert_parity(
        actual, stock, second_derivatives(double, "reference", penalty=False), call.x.dtype
    )


@pytest.mark.parametrize("kinds", [BLOCKS[3], BLOCKS[-3]], ids=["lite", "mobilenet_v3"])
def test_second_derivative_of_a_block(kinds: dict[str, Any]) -> None:
    call = block("no_expansion_residual", dropped=True, **kinds)

    def penalty(function: Any, **options: Any) -> list[Tensor]:
        tensors = {k: None if t is None else t.clone() for k, t in call.tensors.items()}
        inputs = [tensors[name].requires_grad_() for name in call.differentiable]
        y = function(
            tensors["x"], params_of(tensors), call.config, training=True,
            row_scale=tensors["row_scale"], **options,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(y.square().sum(), inputs[:1], create_graph=True)
        return list(torch.autograd.grad(grad.square().sum(), inputs, allow_unused=True))

    actual, stock = penalty(ops.mbconv, backend="cpu"), penalty(reference.mbconv)
    for a, b in zip(actual, stock, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("squeeze", [False, True])
def test_autocast(squeeze: bool) -> None:
    """fp32 tensors give bf16 within its parity, and fp32 gradients."""
    call = block("c_eq_vector", activation="relu6", se_activation="relu6", squeeze=squeeze)
    exact = run_block(call, double=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run_op(call)
    stock = block("c_eq_vector", BF16, activation="relu6", se_activation="relu6", squeeze=squeeze)
    y = run_block(stock)["y"]
    assert actual["y"].dtype is torch.bfloat16
    assert_parity({"y": actual["y"]}, {"y": y}, {"y": exact["y"]}, torch.bfloat16)
    assert all(t.dtype is torch.float32 for k, t in actual.items() if k.startswith("grad "))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("kinds", [BLOCKS[3], BLOCKS[-3]], ids=["lite", "mobilenet_v3"])
def test_compiled(kinds: dict[str, Any]) -> None:
    """One graph, whose values and gradients are those of the eager op."""
    call = block("c_odd_stride_2", **kinds)
    torch._dynamo.reset()
    compiled = torch.compile(ops.mbconv, backend="aot_eager", fullgraph=True)
    assert_same(run_block(call, compiled), run_op(call, "auto"))
