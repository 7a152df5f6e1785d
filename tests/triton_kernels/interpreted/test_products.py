"""The other ops of inference and of squeeze-and-excite, interpreted, against their references."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cases import MBCONV_CASES, POINTWISE_CASES, SQUEEZE_EXCITE_CASES, MBConvCase, find
from effnet_fast import reference
from effnet_fast.ops.mbconv import eval_op as mbconv_eval
from effnet_fast.ops.pointwise_bn_silu_pool import eval_op as pool_eval
from parity import (
    FP32,
    Dtypes,
    assert_parity,
    assert_same,
    channels_last,
    check,
    pointwise_call,
    run,
    squeeze_excite_call,
)

FP16 = Dtypes(torch.float16, torch.float16)
MIXED = Dtypes(torch.float16, torch.float32)
DTYPES = pytest.mark.parametrize("dtypes", [FP32, FP16, MIXED], ids=str)


def by_hand(params: list) -> list[str]:
    """Names of the cases that are no network's own."""
    return [p.id for p in params if not p.id.startswith("b0")]


@DTYPES
@pytest.mark.parametrize("name", by_hand(POINTWISE_CASES))
def test_pointwise(name: str, dtypes: Dtypes) -> None:
    check(pointwise_call(find(POINTWISE_CASES, name), dtypes), "triton", wanted=())


def test_pointwise_of_several_tiles() -> None:
    """More rows, outputs and inputs than a tile holds, none of them a multiple."""
    case = replace(find(POINTWISE_CASES, "gate_residual_no_act"), c=100, out=150, h=11, w=13)
    check(pointwise_call(case), "triton", wanted=())


def test_pointwise_of_strided_input() -> None:
    call = pointwise_call(find(POINTWISE_CASES, "gate_residual_no_act"))
    n, c, h, w = call.x.shape
    larger = torch.randn(n, c, h + 1, w + 2).contiguous(memory_format=torch.channels_last)
    check(call.with_tensors(x=larger[:, :, 1:, 1 : w + 1]), "triton", wanted=())


@DTYPES
@pytest.mark.parametrize("name", by_hand(SQUEEZE_EXCITE_CASES))
def test_squeeze_excite(name: str, dtypes: Dtypes) -> None:
    check(squeeze_excite_call(find(SQUEEZE_EXCITE_CASES, name), dtypes), "triton")


def test_squeeze_excite_without_biases_is_deterministic() -> None:
    call = squeeze_excite_call(find(SQUEEZE_EXCITE_CASES, "c_odd"))
    call = call.with_tensors(reduce_bias=None, expand_bias=None)
    assert_same(check(call, "triton"), run(call, "triton"))


@pytest.mark.parametrize("dtypes", [FP32, FP16], ids=str)
@pytest.mark.parametrize("name", by_hand(MBCONV_CASES))
def test_mbconv_eval(name: str, dtypes: Dtypes) -> None:
    """The inference op of a block."""
    from mbconv_blocks import EPS, block_call, params_of
    from mbconv_blocks import run as run_block

    case: MBConvCase = find(MBCONV_CASES, name)
    call = block_call(case, dtypes, False)
    params = params_of(call.tensors)
    padding = ((case.k - 1) // 2,) * 4
    layers = (params.expand or [], params.depthwise, params.squeeze, params.project)
    y = mbconv_eval(call.x, *layers, case.stride, padding, EPS, case.residual, "triton")
    stock, exact = (run_block(call, wanted=(), double=double)["y"] for double in (False, True))
    assert_parity({"y": y}, {"y": stock}, {"y": exact}, dtypes.x)


@DTYPES
@pytest.mark.parametrize("size", [(3, 21, 70, 5, 5), (2, 16, 24, 9, 11), (1, 40, 33, 1, 1),
                                  (0, 8, 16, 7, 7)], ids=str)  # fmt: skip
def test_pooled_head(size: tuple[int, ...], dtypes: Dtypes) -> None:
    """Tiles that cross images, and images of more than one tile."""
    n, c, out, h, w = size
    x = channels_last(torch.randn(n, c, h, w).to(dtypes.x))
    tensors = [torch.randn(out, c, 1, 1) / c**0.5, *(torch.rand(4, out) + 0.5)]
    tensors = [t.to(dtypes.parameters) for t in tensors]

    def stock(convert: torch.dtype | None) -> dict[str, torch.Tensor]:
        wide = [t if convert is None else t.to(convert) for t in (x, *tensors)]
        y = reference.pointwise_bn_act(*wide, eps=1e-3)
        return {"y": y.mean((2, 3))}

    actual = {"y": pool_eval(x, *tensors, 1e-3, "triton")}
    assert_parity(actual, stock(None), stock(torch.float64), dtypes.x)
