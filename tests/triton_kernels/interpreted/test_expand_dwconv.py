"""Expansion and depthwise convolution in one kernel, interpreted, against the references."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from cases import MBCONV_CASES, find
from effnet_fast import reference
from effnet_fast.triton_kernels import expand_choice, expand_dwconv, mbconv
from mbconv_blocks import EPS, BlockCall, block_call, params_of
from mbconv_blocks import run as run_block
from parity import FP32, Dtypes, Results, assert_parity
from tiers import some

FP16 = Dtypes(torch.float16, torch.float16)
MIXED = Dtypes(torch.float16, torch.float32)
DTYPES = pytest.mark.parametrize("dtypes", some((FP32, FP16, MIXED), (FP16,)))
CASES = [p.values[0] for p in MBCONV_CASES if not p.id.startswith("b0")]
NAMES = [case.name for case in CASES if case.expanded != case.c]


def sides_of(call: BlockCall, kernel: int) -> tuple[int, int, int, int]:
    return ((kernel - 1) // 2,) * 4 if call.config.padding is None else call.config.padding


def fused(call: BlockCall) -> Results:
    params = params_of(call.tensors)
    assert params.expand is not None
    sides = sides_of(call, params.depthwise.weight.shape[-1])
    y, pooled = expand_dwconv.launch_expand_dwconv_fwd(
        call.x, params.expand, params.depthwise, call.config.stride, sides, EPS,
        call.config.activation,
    )  # fmt: skip
    return {"y": y, "pooled": pooled}


def composed(call: BlockCall, double: bool) -> Results:
    tensors = {k: t.double() if double and t is not None else t for k, t in call.tensors.items()}
    params, x = params_of(tensors), tensors["x"]
    assert params.expand is not None
    activation = call.config.activation
    e = reference.pointwise_bn_act(x, *params.expand, eps=EPS[0], activation=activation)
    sides = sides_of(call, params.depthwise.weight.shape[-1])
    y = reference.dwconv_bn_silu(
        e, *params.depthwise, stride=call.config.stride, padding=sides, eps=EPS[1],
        activation=activation,
    )  # fmt: skip
    pooled = y.mean((2, 3)) if y.numel() else y.new_zeros(y.shape[:2])
    return {"y": y, "pooled": pooled.double() if double else pooled.float()}


def check(call: BlockCall) -> None:
    assert_parity(fused(call), composed(call, False), composed(call, True), call.x.dtype)


@DTYPES
@pytest.mark.parametrize("name", some(NAMES, ("c_odd_k3_stride_2", "w_gt_tile_k5")))
def test_matches_reference(name: str, dtypes: Dtypes) -> None:
    check(block_call(find(MBCONV_CASES, name), dtypes, False))


@pytest.mark.parametrize("activation", some(("relu6", "relu", "identity"), ("relu6",)))
def test_other_activations(activation: str) -> None:
    call = block_call(find(MBCONV_CASES, "w_gt_tile_k5"), FP16, False, activation=activation)
    check(call)


@pytest.mark.exhaustive
@pytest.mark.parametrize("padding", [(1, 2, 2, 3), (0, 1, 0, 1)], ids=str)
@pytest.mark.parametrize("name", ["c_odd_stride_2", "c_eq_vector"])
def test_padding(name: str, padding: tuple[int, int, int, int]) -> None:
    check(block_call(find(MBCONV_CASES, name), FP16, False, padding=padding))


@pytest.mark.exhaustive
@pytest.mark.parametrize("run", some((2, 3), (2,)))
@pytest.mark.parametrize("name", some(("w_gt_tile_stride_2", "w_gt_tile_k5"), ("w_gt_tile_k5",)))
def test_strips(name: str, run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of every height, the last shorter than the others."""
    monkeypatch.setattr(expand_choice, "strip_rows", lambda shape, tile: run)
    check(block_call(find(MBCONV_CASES, name), FP16, False))


def block(call: BlockCall, **options: bool) -> Tensor:
    params = params_of(call.tensors)
    sides = sides_of(call, params.depthwise.weight.shape[-1])
    layers = (params.expand or [], params.depthwise, params.squeeze or [], params.project)
    config = call.config
    kinds = (config.activation, config.se_activation, config.gate)
    return mbconv.mbconv_eval(
        call.x, *layers, config.stride, sides, EPS, config.residual, *kinds, "triton", **options
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", [True, False])
@pytest.mark.parametrize("name", ["c_odd_stride_2", "c_eq_vector"])
def test_block_either_way(name: str, way: bool) -> None:
    dtypes = FP16
    call = block_call(find(MBCONV_CASES, name), dtypes, False)
    y = block(call, fused=way)
    stock, exact = (run_block(call, wanted=(), double=double)["y"] for double in (False, True))
    assert_parity({"y": y}, {"y": stock}, {"y": exact}, dtypes.x)


@pytest.mark.parametrize("answer", [True, False])
def test_the_model_decides(answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    original = mbconv.launch_expand_dwconv_fwd
    monkeypatch.setattr(expand_choice, "is_joined_quicker", lambda shape, tile: answer)
    monkeypatch.setattr(
        mbconv, "launch_expand_dwconv_fwd", lambda *args: called.append(1) or original(*args)
    )
    call = block_call(find(MBCONV_CASES, "c_odd_k3_stride_2"), FP16, False)
    block(call)
    assert len(called) == answer
    block(call, fused=not answer)
    assert len(called) == 1


@pytest.mark.parametrize(
    "kinds",
    [{"squeeze": False}, {"se_activation": "relu"}, {"gate": "hardsigmoid"}],
    ids=str,
)
def test_a_block_whose_gate_does_not_spread_a_nan(
    kinds: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its expansion and its depthwise convolution stay apart."""
    monkeypatch.setattr(expand_choice, "is_joined_quicker", lambda shape, tile: True)
    monkeypatch.delattr(mbconv, "launch_expand_dwconv_fwd")
    block(block_call(find(MBCONV_CASES, "c_odd_k3_stride_2"), FP16, False, **kinds))


@pytest.mark.exhaustive
def test_two_runs_are_equal() -> None:
    call = block_call(find(MBCONV_CASES, "c_eq_vector"), FP16, False)
    assert torch.equal(block(call, fused=True), block(call, fused=True))


@pytest.mark.parametrize("value", some((float("nan"), float("inf")), (float("inf"),)))
def test_what_is_not_finite_stays_in_its_image(value: float) -> None:
    call = block_call(find(MBCONV_CASES, "w_gt_tile_k5"), FP32, False)
    x = call.x.clone(memory_format=torch.preserve_format)
    x[1, 3, 2, 11] = value
    call = call.with_tensors(x=x)
    y, stock = block(call, fused=True), run_block(call, wanted=())["y"]
    assert torch.equal(y.isnan(), stock.isnan())
    assert y[1].isnan().all()
    assert y[0].isfinite().all()


def test_too_many_channels() -> None:
    call = block_call(find(MBCONV_CASES, "c_eq_vector"), FP32, False)
    params = params_of(call.tensors)
    x = torch.zeros(1, 136, 4, 4).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="x has 136 channels, allowed are up to 128"):
        expand_dwconv.launch_expand_dwconv_fwd(
            x, params.expand, params.depthwise, 1, (1, 1, 1, 1), EPS, "silu"
        )


@triton.jit
def relu(u):
    return tl.maximum(u, 0.0)


@triton.jit
def without_mean(weight, bias, mean, var, eps, c, mask):
    one = tl.full(c.shape, 1.0, tl.float32)
    return one, one * 0.0


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "fault"), [("quick_silu", relu), ("folded_affine", without_mean)])
def test_a_wrong_function_is_noticed(
    name: str, fault: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expand_dwconv, name, fault)
    with pytest.raises(AssertionError):
        check(block_call(find(MBCONV_CASES, "c_eq_vector"), FP32, False))


def test_a_lost_column_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that begin one column too late."""
    grid = expand_choice.grid
    monkeypatch.setattr(
        expand_choice, "grid", lambda *args: (grid(*args)[0], grid(*args)[1] - 1, grid(*args)[2])
    )
    with pytest.raises(AssertionError):
        check(block_call(find(MBCONV_CASES, "w_gt_tile_k5"), FP32, False))
