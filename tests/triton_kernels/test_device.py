"""The Triton kernels on a CUDA device: the parity tables of the ops, in every dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mbconv_blocks
from cases import (
    DWCONV_CASES,
    MBCONV_CASES,
    POINTWISE_CASES,
    SQUEEZE_EXCITE_CASES,
    DwconvCase,
    MBConvCase,
    PointwiseCase,
    SqueezeExciteCase,
    find,
)
from effnet_fast import backends, ops
from effnet_fast.ops.mbconv import mbconv
from effnet_fast.triton_kernels.expand_choice import MAX_CHANNELS
from parity import (
    BF16,
    FP32,
    MODES,
    Call,
    Dtypes,
    assert_parity,
    assert_same,
    dwconv_call,
    pointwise_call,
    run,
    squeeze_excite_call,
)

pytestmark = pytest.mark.gpu
FP16 = Dtypes(torch.float16, torch.float16)
DTYPES = pytest.mark.parametrize(
    "dtypes", [FP32, BF16, FP16, Dtypes(torch.bfloat16, torch.float32)], ids=str
)


@pytest.fixture(autouse=True)
def _device() -> None:
    if reason := backends.can_run("triton", "dwconv_bn_silu"):
        pytest.skip(reason)


def test_stock_convolutions_are_not_tf32() -> None:
    """The parity of fp32 would else be judged by an error a thousand times as large."""
    assert not torch.backends.cudnn.allow_tf32


def on_device(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors with their strides on the device."""
    return {k: None if t is None else t.cuda() for k, t in tensors.items()}


def check(call: Call, wanted: tuple[str, ...] | None = None) -> None:
    call = call.with_tensors(**on_device(call.tensors))
    results = [
        run(call, *backend, wanted=wanted, double=double)
        for backend, double in ((("triton",), False), ((), False), ((), True))
    ]
    assert_parity(*results, call.x.dtype)


@MODES
@DTYPES
@pytest.mark.parametrize("case", DWCONV_CASES)
def test_dwconv_bn_silu(case: DwconvCase, dtypes: Dtypes, training: bool) -> None:
    if training and case.values_per_channel == 1:
        return
    call = dwconv_call(case, dtypes, training)
    check(call)
    check(call, ())


@DTYPES
@pytest.mark.parametrize("case", POINTWISE_CASES)
def test_pointwise(case: PointwiseCase, dtypes: Dtypes) -> None:
    check(pointwise_call(case, dtypes), ())


@DTYPES
@pytest.mark.parametrize("case", SQUEEZE_EXCITE_CASES)
def test_squeeze_excite(case: SqueezeExciteCase, dtypes: Dtypes) -> None:
    check(squeeze_excite_call(case, dtypes))


@MODES
@DTYPES
@pytest.mark.parametrize("case", MBCONV_CASES)
def test_mbconv(case: MBConvCase, dtypes: Dtypes, training: bool) -> None:
    call = mbconv_blocks.block_call(case, dtypes, training, dropped=case.residual)
    call = mbconv_blocks.BlockCall(on_device(call.tensors), call.config, call.training)
    actual = mbconv_blocks.run(call, mbconv, backend="triton")
    assert_same(mbconv_blocks.run(call, mbconv, backend="triton"), actual)
    stock, exact = (mbconv_blocks.run(call, double=double) for double in (False, True))
    assert_parity(actual, stock, exact, dtypes.x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [p for p in MBCONV_CASES if p.values[0].c < p.values[0].expanded])
def test_fused_expansion(case: MBConvCase, dtype: torch.dtype) -> None:
    """Expansion and depthwise convolution in one kernel and in two, twice the same bits."""
    call = mbconv_blocks.block_call(case, Dtypes(dtype, dtype), False)
    call = mbconv_blocks.BlockCall(on_device(call.tensors), call.config, call.training)
    params = mbconv_blocks.params_of(call.tensors)
    from effnet_fast.triton_kernels.mbconv import mbconv_eval  # needs triton

    layers = (params.expand, params.depthwise, params.squeeze, params.project)
    kinds = ("silu", "silu", "sigmoid", "triton")
    options = (case.stride, ((case.k - 1) // 2,) * 4, mbconv_blocks.EPS, case.residual, *kinds)
    stock, exact = (
        mbconv_blocks.run(call, wanted=(), double=double)["y"] for double in (False, True)
    )
    for fused in (False, True)[: 1 + (case.c <= MAX_CHANNELS)]:
        y, again = (mbconv_eval(call.x, *layers, *options, fused=fused) for _ in range(2))
        assert torch.equal(y, again)
        assert_parity({"y": y}, {"y": stock}, {"y": exact}, dtype)


@pytest.mark.parametrize("op", ["dwconv_bn_silu", "squeeze_excite"])
def test_compiled_gives_the_same_values(op: str) -> None:
    """torch.compile of an op, forward and every gradient, against eager."""
    call = dwconv_call(find(DWCONV_CASES, "c_odd"), BF16, True)
    if op == "squeeze_excite":
        call = squeeze_excite_call(find(SQUEEZE_EXCITE_CASES, "c_odd"), BF16)
    call = call.with_tensors(**on_device(call.tensors))
    eager = run(call, "triton")
    original = getattr(ops, op)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, op, torch.compile(original, fullgraph=True))
        assert_same(run(call, "triton"), eager)


def test_a_captured_graph_replays() -> None:
    """Nothing in an inference synchronises or allocates outside the graph's pool."""
    call = pointwise_call(find(POINTWISE_CASES, "gate_residual_no_act"), BF16)
    tensors = on_device(call.tensors)
    options = call.options | {"backend": "triton"}
    with torch.inference_mode():
        eager = ops.pointwise_bn_act(**tensors, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.pointwise_bn_act(**tensors, **options)
        graph.replay()
    assert torch.equal(y, eager)
