"""The choice of a backend, and the reasons that a caller reads where it cannot run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cases import DWCONV_CASES, DwconvCase, find
from effnet_fast import ops
from effnet_fast.backends import (
    BACKENDS,
    OPS,
    Backend,
    OpArgs,
    can_run,
    cpu,
    cuda,
    current_backend,
    explain,
    is_channels_last,
    native,
    preference,
    resolve,
    triton,
    use_backend,
)
from effnet_fast.backends.base import kernel_reason
from effnet_fast.modules.explain import explain as explain_module
from effnet_fast.modules.layers import Conv2dNormActivation
from parity import SAMPLES, Call, assert_same, dwconv_call, run, sample, with_gradients

ANY_SAMPLE = pytest.mark.parametrize("name", SAMPLES)
UNKNOWN = ("gpu", "", "CPU", "cuda:avx2", "auto:generic", ":avx2")


@ANY_SAMPLE
def test_named_instruction_sets(name: str) -> None:
    """Without a name the best one runs; one that is not there says so."""
    call = sample(name)
    wanted = with_gradients(call)
    extension = native.load()
    assert extension.isas()[0] == "generic"
    assert extension.isa_unavailable_reason("generic") is None
    best = run(call, f"cpu:{extension.best_isa()}", wanted=wanted)
    assert_same(run(call, "cpu", wanted=wanted), best)
    reason = r"cpu:sse9: instruction set 'sse9' is not in this build"
    with pytest.raises(RuntimeError, match=rf"'cpu:sse9' cannot run {call.op}: {reason}"):
        run(call, "cpu:sse9", wanted=wanted)


def test_instruction_sets_differ() -> None:
    """They do not all run the same code: rounding tells plain code from fused multiply-add."""
    call = dwconv_call(find(DWCONV_CASES, "b0_c240_28_k5_s1"))
    generic = run(call, "cpu:generic")
    if reason := can_run("cpu:avx2", call.op):
        pytest.skip(reason)
    assert not torch.equal(generic["y"], run(call, "cpu:avx2")["y"])


@pytest.mark.parametrize("backend", UNKNOWN)
def test_unknown_backend(backend: str) -> None:
    call = sample("dwconv_eval")
    for function in (
        lambda: run(call, backend),
        lambda: use_backend(backend).__enter__(),
        lambda: can_run(backend, "dwconv_bn_silu"),
    ):
        with pytest.raises(ValueError, match=r"unknown backend .*; allowed are auto, reference"):
            function()
    assert current_backend() == "auto"


def test_unknown_op() -> None:
    with pytest.raises(ValueError, match="unknown op 'conv'; allowed are dwconv_bn_silu"):
        can_run("cpu", "conv")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_can_run_in_general(backend: str, op: str) -> None:
    reason = can_run(backend, op)
    if backend in ("auto", "reference", "cpu"):
        assert reason is None
    elif backend == "triton":
        expected = None if torch.cuda.is_available() else "there is no CUDA device"
        assert reason == expected
    else:
        assert reason


def test_a_missing_extension_is_told_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    call = sample("dwconv_eval")
    missing = SimpleNamespace(unavailable_reason=lambda: "effnet_fast._C is not there")
    monkeypatch.setattr(cpu, "native", missing)
    monkeypatch.setattr(cuda, "native", missing)
    monkeypatch.setattr(triton, "native", missing)
    assert_same(run(call, "auto"), run(call))
    for backend in ("cpu", "cuda", "triton"):
        with pytest.raises(RuntimeError, match=r"effnet_fast\._C is not there"):
            run(call, backend)


@ANY_SAMPLE
def test_triton_refuses_cpu_tensors_and_says_how_tests_run(name: str) -> None:
    call = sample(name)
    with pytest.raises(RuntimeError, match=r"x is on cpu, .* started with TRITON_INTERPRET=1"):
        run(call, "triton", wanted=with_gradients(call))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"x": torch.ones(1, 8, 3, 3, dtype=torch.float64)}, "float32, bfloat16 and float16"),
        ({"kernel": (2, 2)}, "the kernel is 2x2"),
        ({"stride": 3}, "the stride is 3"),
        ({"x": torch.ones(1, 8, 3, 3).half()}, None),
        ({"others": (torch.ones(8).double(),)}, "a parameter is torch.float64"),
    ],
)  # fmt: skip
def test_what_triton_takes(
    change: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device aside: all dtypes of 32 bits and less, square odd kernels, strides 1 and 2."""
    monkeypatch.setattr(triton, "_device_reason", lambda device: None)
    x = torch.ones(1, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    args = OpArgs(**({"x": x} | change))
    args = args._replace(x=args.x.contiguous(memory_format=torch.channels_last))
    found = can_run("triton", "dwconv_bn_silu", args)
    assert found is None if reason is None else reason in (found or "")


def test_interpreted_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_interprets", lambda: True)
    for dtype, refused in ((torch.bfloat16, True), (torch.float16, False)):
        x = torch.ones(1, 8, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
        reason = can_run("triton", "squeeze_excite", OpArgs(x))
        assert (reason is not None) == refused, reason


def test_a_missing_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(triton.importlib, "import_module", missing)
    triton._unavailable_reason.cache_clear()
    reason = can_run("triton", "mbconv")
    triton._unavailable_reason.cache_clear()
    assert reason is not None
    assert "No module named 'triton'" in reason
    assert "pip install 'effnet-fast[triton]'" in reason


def test_preferences_are_backends_and_say_where_they_come_from() -> None:
    for row in preference.PREFERENCES:
        assert set(row.order) <= set(BACKENDS) - {"auto", "reference"}
        assert row.op in (*OPS, "*")
        assert row.source == "heuristic" or row.source.startswith("measured(")
    assert preference.order("cpu", "mbconv") == ("cpu",)
    assert preference.order("cuda", "pointwise_bn_act")[0] == "triton"
    assert preference.order("xpu", "mbconv") == ()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_auto_leaves_dense_layers_of_many_channels_to_pytorch(training: bool) -> None:
    """From 64 input channels on; a backend named by the caller runs them."""
    for channels, expected in ((63, "cpu"), (64, "reference")):
        layer = Conv2dNormActivation(channels, 8, 3, activation_layer=nn.SiLU).train(training)
        x = torch.randn(2, channels, 6, 6).contiguous(memory_format=torch.channels_last)
        tensors = (layer[0].weight, layer[1].weight, layer[1].bias, torch.zeros(8), torch.ones(8))
        args = OpArgs(x, tensors)
        assert resolve("auto", "stem_conv_bn_silu", args) == expected
        assert resolve("cpu", "stem_conv_bn_silu", args) == "cpu"
        reason = explain_module(layer)
        assert reason == explain("auto", "stem_conv_bn_silu", args)
        assert reason is None if expected == "cpu" else "PyTorch's dense" in str(reason)
        if expected == "reference":
            assert torch.equal(layer(x), layer.forward_stock(x))


def test_auto_takes_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    x = OpArgs(sample("dwconv_eval").x)
    monkeypatch.setattr(preference, "order", lambda *_: ("cuda", "cpu", "triton"))
    assert resolve("auto", "dwconv_bn_silu", x) == "cpu"
    monkeypatch.setattr(preference, "order", lambda *_: ("cuda",))
    assert resolve("auto", "dwconv_bn_silu", x) == "reference"


REFUSED: dict[str, tuple[Callable[[Call], Call], str]] = {
    "float64": (
        lambda call: call.with_tensors(x=call.x.double()),
        r"x is torch\.float64, the cpu backend takes float32 and bfloat16",
    ),
    "float16": (
        lambda call: call.with_tensors(x=call.x.half()),
        r"x is torch\.float16, the cpu backend takes float32 and bfloat16",
    ),
    "parameter_of_a_third_dtype": (
        lambda call: call.with_tensors(
            **{list(call.tensors)[1]: list(call.tensors.values())[1].double()}
        ),
        r"a parameter is torch\.float64; allowed are torch\.float32 and torch\.float32",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
@ANY_SAMPLE
def test_refused_dtypes(name: str, reason: str) -> None:
    """By name an error, by "auto" the reference."""
    change, words = REFUSED[reason]
    call = change(sample(name))
    wanted = with_gradients(call)
    with pytest.raises(RuntimeError, match=f"backend 'cpu' cannot run {call.op}: {words}"):
        run(call, "cpu", wanted=wanted)
    assert_same(run(call, "auto", wanted=wanted), run(call, wanted=wanted))


@ANY_SAMPLE
def test_meta_device_goes_through_the_reference(name: str) -> None:
    call = sample(name)
    meta = {k: v.to("meta") for k, v in call.tensors.items()}
    call = call.with_tensors(**meta)
    wanted = with_gradients(call)
    with pytest.raises(RuntimeError, match="x is on meta, the cpu backend takes CPU tensors"):
        run(call, "cpu", wanted=wanted)
    function = getattr(ops, call.op)
    assert function(**call.tensors, **call.options).is_meta


@ANY_SAMPLE
def test_backends_without_a_kernel(name: str) -> None:
    call, backend = sample(name), "cuda"
    reason = can_run(backend, call.op)
    if reason is None:
        pytest.skip("it has one, and a device")
    with pytest.raises(RuntimeError) as info:
        run(call, backend, wanted=with_gradients(call))
    assert str(info.value) == f"backend {backend!r} cannot run {call.op}: {reason}"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (DwconvCase("even", 2, 6, 8, 8, 4), "the kernel is 4x4; square and odd is supported"),
        (DwconvCase("stride_3", 2, 6, 8, 8, 3, 3), "the stride is 3; 1 and 2 are supported"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_refused_geometry(case: DwconvCase, words: str) -> None:
    call = dwconv_call(case, training=True)
    with pytest.raises(RuntimeError, match=f"'cpu' cannot run dwconv_bn_silu: {words}"):
        run(call, "cpu")
    assert_same(run(call, "auto"), run(call))


BAD: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    # name: (sample, changed arguments, error, words of its text)
    "x_list": ("dwconv_eval", {"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x_int": ("dwconv_eval", {"x": torch.ones(2, 37, 9, 9).int()}, TypeError, "floating dtype"),
    "x_rank": ("dwconv_eval", {"x": torch.ones(37, 9, 9)}, ValueError, r"x must be \[N,C,H,W\]"),
    "x_channels": ("dwconv_train", {"x": torch.ones(2, 36, 9, 9)}, ValueError, "C = 36 as in x"),
    "bn_weight": ("dwconv_train", {"bn_weight": torch.ones(36)}, ValueError, r"\[37\], got \[36\]"),
    "device": ("dwconv_eval", {"bn_bias": torch.ones(37, device="meta")}, ValueError, "device"),
    "stride": ("dwconv_eval", {"stride": 0}, ValueError, "stride must be .*got 0"),
    "padding": ("dwconv_eval", {"padding": (1, 1)}, ValueError, "padding must be"),
    "kernel": (
        "dwconv_eval",
        {"x": torch.ones(2, 37, 2, 9), "padding": 1},
        ValueError,
        r"\[4, 11\] is smaller than the 5x5 kernel",
    ),
    "se_rank": ("squeeze_excite", {"x": torch.ones(3, 37)}, ValueError, r"x must be \[N,C,H,W\]"),
    "se_empty": ("squeeze_excite", {"x": torch.ones(1, 37, 0, 5)}, ValueError, "H and W of at"),
    "se_weight": ("squeeze_excite", {"reduce_weight": torch.ones(9, 36)}, ValueError, "reduce_w"),
    "se_bias": ("squeeze_excite", {"expand_bias": torch.ones(9)}, ValueError, "expand_bias must"),
    "pw_weight": ("pointwise_eval", {"weight": torch.ones(40, 24, 3, 3)}, ValueError, "weight"),
    "pw_gate": ("pointwise_eval", {"gate": torch.ones(2, 40)}, ValueError, "gate must have shape"),
    "pw_act": (
        "pointwise_eval",
        {"act": "tanh"},
        ValueError,
        "act must be one of silu, identity, relu",
    ),
    "head_weight": ("head_train", {"weight": torch.ones(21, 36, 1, 1)}, ValueError, "Cin = 37"),
    "head_empty": ("head_train", {"x": torch.ones(1, 37, 0, 5)}, ValueError, "H and W of at"),
    "pw_residual": (
        "pointwise_eval",
        {"residual": torch.ones(2, 24, 7, 8)},
        ValueError,
        r"residual must have shape \[2, 24, 7, 7\]",
    ),
}


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@ANY_SAMPLE
def test_unknown_names_are_listed(name: str, backend: str) -> None:
    call = sample(name)
    function = functools.partial(getattr(ops, call.op), **call.tensors, backend=backend)
    for bad in ("tanh", "SiLU", None, 6):
        known = "silu, identity, relu, relu6, hardswish"
        if bad is not None or call.op != "pointwise_bn_act":  # whose None is the `act`
            with pytest.raises(ValueError, match=f"activation must be one of {known}, got {bad!r}"):
                function(activation=bad)
        if call.op == "squeeze_excite":
            with pytest.raises(ValueError, match=f"gate must be one of sigmoid, hardsigm.*{bad!r}"):
                function(gate=bad)


@pytest.mark.parametrize("act", [None, "relu", "silu"])
def test_act_and_activation_are_one(act: str | None) -> None:
    call = sample("pointwise_eval")
    run_act = functools.partial(ops.pointwise_bn_act, **call.tensors)
    expected = run_act(act=act)
    assert torch.equal(run_act(), expected) == (act == "silu")
    assert torch.equal(run_act(activation=act or "identity"), expected)
    assert torch.equal(run_act(act=act, activation=act or "identity"), expected)
    with pytest.raises(ValueError, match="activation is 'relu6': give one of the two"):
        run_act(act=act, activation="relu6")


def _no_kernels(name: str) -> Backend:
    """A backend with this name and SiLU alone, whatever else it has."""
    return Backend(
        *(name, cpu.NATIVE_DTYPES, ("cpu",), lambda *_: None), activations=("silu",),
        gates=("sigmoid",),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ({"activations": ("silu", "relu6")}, "the activation is relu6; the b backend has silu"),
        ({"gate": "hardsigmoid"}, "the gate is hardsigmoid; the b backend has sigmoid"),
        ({"gate": None}, "the b backend has no kernel for blocks without squeeze-excite"),
        ({}, None),
        ({"activations": ()}, None),
    ],
)
def test_what_a_backend_has_stands_in_its_table(kinds: dict[str, Any], words: str | None) -> None:
    args = OpArgs(sample("dwconv_eval").x, **kinds)
    assert kernel_reason(_no_kernels("b"), "dwconv_bn_silu", args) == words


def test_auto_leaves_what_a_backend_lacks_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.CPU, "activations", ("silu",))
    call = sample("dwconv_train").with_options(activation="hardswish")
    assert_same(run(call, "auto"), run(call))
    with pytest.raises(RuntimeError, match="'cpu' cannot run dwconv_bn_silu: the activation is ha"):
        run(call, "cpu")


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_inputs(bad: str, backend: str) -> None:
    """The errors of the reference, whatever the backend."""
    name, changes, error, words = BAD[bad]
    call = sample(name)
    arguments = call.tensors | call.options | changes
    with pytest.raises(error, match=words):
        getattr(ops, call.op)(**arguments, backend=backend)


def test_is_channels_last() -> None:
    nchw = torch.empty(2, 3, 4, 5)
    nhwc = nchw.contiguous(memory_format=torch.channels_last)
    assert not is_channels_last(nchw)
    assert is_channels_last(nhwc)
    assert is_channels_last(nhwc[:, 1:, ::2, 1:])
    assert is_channels_last(nchw[:, :1])
    assert is_channels_last(nchw[:0])
    assert is_channels_last(torch.empty(2, 3, 1, 1))
    assert not is_channels_last(nhwc[:, :, :, :1].expand(2, 3, 4, 5))


def test_resolve_never_says_auto() -> None:
    x = torch.empty(1, 3, 4, 4)
    args = OpArgs(x.contiguous(memory_format=torch.channels_last))
    assert resolve("auto", "squeeze_excite", args) == "cpu"
    assert resolve("auto", "squeeze_excite", OpArgs(x)) == "reference"
    assert resolve("cpu:generic", "squeeze_excite", args) == "cpu:generic"
