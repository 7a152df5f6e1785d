"""The inference op of a whole block against the references of its parts."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from torch import Tensor

import tiers
from allocations import poisoned
from cases import LARGE_MBCONV_CASES, MBCONV_CASES, MBConvCase, find
from effnet_fast import reference
from effnet_fast.ops import scratch
from effnet_fast.ops.mbconv import eval_op
from parity import BF16, DTYPES, FP32, Dtypes, assert_parity, channels_last, matrix

EPS = [1e-3, 1e-4, 1e-5]
Parts = dict[str, list[Tensor]]


def block(case: MBConvCase, dtypes: Dtypes) -> tuple[Tensor, Parts]:
    """x, and the parameters of each layer: weight, bn_weight, bn_bias, mean, var."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def layer(out: int, inputs: int, kernel: int) -> list[Tensor]:
        weight = normal(out, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5
        positive = torch.rand(2, out, generator=generator) + 0.5
        return [weight, positive[0], 0.3 * normal(out), 0.3 * normal(out), positive[1]]

    parts = {
        "expand": layer(case.expanded, case.c, 1) if case.expanded != case.c else [],
        "depthwise": layer(case.expanded, 1, case.k),
        "squeeze": [
            normal(case.r, case.expanded, 1, 1) / case.expanded**0.5,
            normal(case.r),
            normal(case.expanded, case.r, 1, 1) / case.r**0.5,
            normal(case.expanded),
        ],
        "project": layer(case.out, case.expanded, 1),
    }
    x = channels_last(normal(case.n, case.c, case.h, case.w).to(dtypes.x))
    return x, {name: [t.to(dtypes.parameters) for t in part] for name, part in parts.items()}


def run_op(case: MBConvCase, x: Tensor, parts: Parts, backend: str) -> Tensor:
    padding = ((case.k - 1) // 2,) * 4
    with poisoned():
        kinds = ("silu", "silu", "sigmoid", backend)
        return eval_op(x, *parts.values(), case.stride, padding, EPS, case.residual, *kinds)


def run_reference(case: MBConvCase, x: Tensor, parts: Parts) -> Tensor:
    h = x
    if parts["expand"]:
        h = reference.pointwise_bn_act(h, *parts["expand"], eps=EPS[0])
    h = reference.dwconv_bn_silu(h, *parts["depthwise"], stride=case.stride, eps=EPS[1])
    h = reference.squeeze_excite(h, *parts["squeeze"])
    residual = x if case.residual else None
    return reference.pointwise_bn_act(h, *parts["project"], act=None, residual=residual, eps=EPS[2])


@functools.lru_cache(maxsize=2)
def expectation(case: MBConvCase, dtypes: Dtypes) -> tuple[Tensor, Parts, Tensor, Tensor]:
    """x, the parameters, and y in stock's arithmetic and in float64."""
    x, parts = block(case, dtypes)
    doubles = {name: [t.double() for t in part] for name, part in parts.items()}
    stock, exact = run_reference(case, x, parts), run_reference(case, x.double(), doubles)
    return x, parts, stock, exact


@matrix(MBCONV_CASES, DTYPES, tiers.INSTRUCTION_SETS)
def test_matches_reference(case: MBConvCase, dtypes: Dtypes, backend: str) -> None:
    x, parts, stock, exact = expectation(case, dtypes)
    before = x.clone()
    actual = run_op(case, x, parts, backend)
    assert_parity({"y": actual}, {"y": stock}, {"y": exact}, dtypes.x)
    assert torch.equal(x, before)


@matrix(LARGE_MBCONV_CASES, (FP32, BF16), ("cpu",))
def test_matches_reference_where_large(case: MBConvCase, dtypes: Dtypes, backend: str) -> None:
    x, parts, stock, exact = expectation(case, dtypes)
    assert_parity({"y": run_op(case, x, parts, backend)}, {"y": stock}, {"y": exact}, dtypes.x)


@pytest.mark.parametrize("part", ["expand", "depthwise", "squeeze", "project"])
def test_parity_notices_swapped_channels(part: str) -> None:
    case = find(MBCONV_CASES, "c_eq_vector")
    x, parts, stock, exact = expectation(case, FP32)
    weight = parts[part][0].clone()
    weight[[0, 3]] = weight[[3, 0]]
    actual = run_op(case, x, parts | {part: [weight, *parts[part][1:]]}, "cpu")
    with pytest.raises(AssertionError, match="y: rms error"):
        assert_parity({"y": actual}, {"y": stock}, {"y": exact}, torch.float32)


@pytest.fixture(autouse=True)
def _own_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_local", threading.local())


def test_shared_memory_changes_nothing() -> None:
    """Blocks of any order of sizes may share buffers; no output lies in one."""
    blocks = [(p.values[0], *block(p.values[0], FP32)) for p in MBCONV_CASES[:6]]
    expected = [run_op(*b, "cpu") for b in blocks]
    with scratch.scope():
        actual = [run_op(*b, "cpu") for b in blocks for _ in range(2)][::2]
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_shared_memory_belongs_to_the_scope() -> None:
    like = torch.empty(0)
    with scratch.scope():
        first = scratch.empty_nhwc("a", like, (2, 8, 4, 4))
        with scratch.scope():
            second = scratch.empty_nhwc("a", like, (1, 8, 4, 4))
            other = scratch.empty_nhwc("b", like, (2, 8, 4, 4))
        third = scratch.empty_nhwc("a", like, (2, 8, 4, 4))
        assert first.data_ptr() == second.data_ptr() == third.data_ptr() != other.data_ptr()
        assert scratch.empty_nhwc("a", like.double(), (1, 8, 4, 4)).dtype == torch.float64
    outside = [scratch.empty_nhwc("a", like, (2, 8, 4, 4)) for _ in range(2)]
    assert outside[0].data_ptr() != outside[1].data_ptr()
    for tensor in (first, second, *outside):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_shared_memory_stays_for_the_next_pass(outer, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch.release()
    like, shape = torch.empty(0), (1, 8, 4, 4)
    with outer():
        for _ in range(2):
            with scratch.scope():
                scratch.empty_nhwc("a", like, shape).fill_(1.0)
            assert scratch.kept_bytes() == 8 * 4 * 4 * 4
    with scratch.scope():  # a tensor of inference mode cannot be written to outside
        scratch.empty_nhwc("a", like, shape).fill_(2.0)
    monkeypatch.setattr(scratch, "KEPT_BYTES", 100)
    with scratch.scope():
        pass
    assert scratch.kept_bytes() == 0


def test_shared_memory_is_given_back_after_an_error() -> None:
    seen = []

    def fail() -> None:
        with scratch.scope():
            seen.append(scratch.empty_nhwc("a", torch.empty(0), (1, 8, 4, 4)))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    second = scratch.empty_nhwc("a", torch.empty(0), (1, 8, 4, 4))
    assert seen[0].data_ptr() != second.data_ptr()
