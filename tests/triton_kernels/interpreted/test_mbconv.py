"""The whole block on interpreted Triton kernels against its reference: training and eval."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cases import MBCONV_CASES, find
from effnet_fast.ops.mbconv import mbconv
from mbconv_blocks import BlockCall, block_call, run
from parity import FP32, MODES, Dtypes, Results, assert_parity, assert_same
from tiers import some

FP16 = Dtypes(torch.float16, torch.float16)
MIXED = Dtypes(torch.float16, torch.float32)
NAMES = [p.id for p in MBCONV_CASES if not p.id.startswith("b0")]


def check(call: BlockCall, wanted: tuple[str, ...] | None = None) -> Results:
    actual = run(call, mbconv, backend="triton", wanted=wanted)
    stock, exact = (run(call, double=double, wanted=wanted) for double in (False, True))
    assert_parity(actual, stock, exact, call.x.dtype)
    return actual


@MODES
@pytest.mark.parametrize(
    "name", some(NAMES, ("c_odd_k3_stride_2", "c_odd_k3_residual", "no_expansion_residual"))
)
def test_matches_reference(name: str, training: bool) -> None:
    check(block_call(find(MBCONV_CASES, name), FP32, training))


@pytest.mark.exhaustive
@MODES
@pytest.mark.parametrize("name", [name for name in NAMES if name != "k7"])  # 20 s
def test_fp16_matches_reference(name: str, training: bool) -> None:
    check(block_call(find(MBCONV_CASES, name), FP16, training))


@pytest.mark.parametrize("dtypes", some((FP32, MIXED), (MIXED,)))
@pytest.mark.parametrize(
    "name", some(("c_eq_vector", "no_expansion_residual"), ("no_expansion_residual",))
)
def test_dropped_images(name: str, dtypes: Dtypes) -> None:
    check(block_call(find(MBCONV_CASES, name), dtypes, dropped=True))


def test_lean_memory_is_the_same_and_runs_are_equal() -> None:
    case = find(MBCONV_CASES, "c_odd_k3_stride_2")
    fast = check(block_call(case, FP32))
    assert_same(run(block_call(case, FP32), mbconv, backend="triton"), fast)
    assert_same(run(block_call(case, FP32, memory="lean"), mbconv, backend="triton"), fast)


@pytest.mark.exhaustive
@pytest.mark.parametrize("modes", [(True, False, True), (False, True, False)], ids=str)
def test_mixed_modes_and_asymmetric_padding(modes: tuple[bool, bool, bool]) -> None:
    """Over eight draws, stacked: the error of few numbers is chance."""
    case = find(MBCONV_CASES, "c_odd_k3_stride_2")
    rows: tuple[list[Results], ...] = ([], [], [])
    for seed in range(8):
        call = block_call(case, FP32, modes, padding=(1, 2, 2, 3), seed=seed)
        rows[0].append(run(call, mbconv, backend="triton"))
        rows[1].append(run(call))
        rows[2].append(run(call, double=True))
    stacked = ({name: torch.stack([r[name] for r in row]) for name in row[0]} for row in rows)
    assert_parity(*stacked, torch.float32)


@pytest.mark.exhaustive
def test_folds_of_several_levels(two_parts_a_run: list[int]) -> None:
    """Sums, statistics and norms of more parts than one program folds."""
    case = replace(find(MBCONV_CASES, "c_eq_vector"), h=19, w=17)
    check(block_call(case, FP32))
    assert max(two_parts_a_run) > 4  # a third level


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "wanted", [("x",), ("expand.weight",), ("squeeze.reduce_bias",), ("project.weight",)]
)
def test_pruned_gradients(wanted: tuple[str, ...]) -> None:
    check(block_call(find(MBCONV_CASES, "c_eq_vector"), FP32), wanted)
