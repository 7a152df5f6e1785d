"""Every activation and gate of the CUDA kernels against the reference, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from activation_calls import exactly_convolved, kinds_of, one_pixel, special
from effnet_fast import ops
from effnet_fast.backends import CUDA, OpArgs
from effnet_fast.backends.base import kernel_reason
from parity import (
    BF16,
    CUDA_NAMES,
    FP16,
    FP32,
    NEEDS_SIMT,
    Call,
    Dtypes,
    assert_parity,
    check,
    run,
    runs,
    sample,
)
from tolerances import assert_same_places

ANY_RUN = runs((FP32, BF16, FP16), CUDA_NAMES)
OTHERS = [name for name in CUDA.activations if name != "silu"]
ANY_ACTIVATION = pytest.mark.parametrize("activation", OTHERS)
SAMPLES = ("dwconv_eval", "dwconv_train", "squeeze_excite")


@ANY_RUN
@ANY_ACTIVATION
def test_ops(activation: str, dtypes: Dtypes, backend: str) -> None:
    """Outputs, gradients and statistics; and the inference of the depthwise convolution."""
    for name in SAMPLES:
        call = exactly_convolved(sample(name, dtypes))
        for kinds in kinds_of(call, activation):
            check(call.activated(**kinds), backend)
    check(sample("dwconv_eval", dtypes).activated(activation=activation), backend, wanted=())


@ANY_RUN
def test_the_gate_of_squeeze_excite(dtypes: Dtypes, backend: str) -> None:
    check(
        sample("squeeze_excite", dtypes).activated(activation="silu", gate="hardsigmoid"), backend
    )


@ANY_RUN
@ANY_ACTIVATION
def test_at_the_bounds(activation: str, dtypes: Dtypes, backend: str) -> None:
    """Values and slopes of x are PyTorch's own: 0 on a bound; of a NaN the slope is 1.

    A kernel of 3x3, as there is none of 1x1, whose other taps meet the padding.
    """
    call = one_pixel("dwconv_bn_silu", special(dtypes.x), activation)
    weight = torch.zeros(1, 1, 3, 3, dtype=dtypes.x)
    weight[..., 1, 1] = 1.0
    call = call.with_tensors(weight=weight)
    ones = torch.ones_like(call.x)
    actual, stock = (run(call, name, wanted=["x"], grad_y=ones) for name in (backend, None))
    plain = run(call, backend, wanted=())
    for y in (actual["y"], plain["y"]):
        assert_same_places(y, stock["y"])
        torch.testing.assert_close(y, stock["y"], equal_nan=True)
    # Stock's BatchNorm makes 0 of a subnormal bf16.
    normal = (call.x.abs() >= torch.finfo(dtypes.x).tiny) | (call.x == 0)
    assert torch.equal(actual["grad x"][normal], stock["grad x"][normal])
    assert float(actual["grad x"][call.x.isnan()]) == 1.0


@NEEDS_SIMT
@pytest.mark.parametrize("name", SAMPLES)
def test_parity_notices_another_activation(name: str) -> None:
    call = sample(name).activated(activation="relu6")
    results = run(call.with_options(activation="identity"), "simt"), run(call)
    with pytest.raises(AssertionError, match="error"):
        assert_parity(*results, run(call, double=True), torch.float32)


@NEEDS_SIMT
def test_parity_notices_another_gate() -> None:
    call = sample("squeeze_excite").activated(activation="relu", gate="hardsigmoid")
    results = run(call.with_options(gate="sigmoid"), "simt"), run(call)
    with pytest.raises(AssertionError, match="error"):
        assert_parity(*results, run(call, double=True), torch.float32)


def test_hardswish_is_refused() -> None:
    args = OpArgs(sample("dwconv_eval").x, activations=("hardswish",))
    known = "silu and identity and relu and relu6"
    expected = f"the activation is hardswish; the cuda backend has {known}"
    assert kernel_reason(CUDA, "dwconv_bn_silu", args) == expected


@NEEDS_SIMT
def test_a_call_by_name_of_what_there_is_no_kernel_for() -> None:
    call: Call = sample("dwconv_eval").with_options(activation="hardswish")
    with pytest.raises(RuntimeError, match="the activation is hardswish"):
        ops.dwconv_bn_silu(**call.tensors, **call.options, backend="simt")
