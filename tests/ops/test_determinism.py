"""The same bits whatever the threads and the state of memory; and no memory kept."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mbconv_blocks
import tiers
from allocations import poisoned
from cases import (
    DWCONV_CASES,
    MBCONV_CASES,
    POINTWISE_CASES,
    SQUEEZE_EXCITE_CASES,
    STEM_CASES,
    DwconvCase,
    MBConvCase,
    PointwiseCase,
    SqueezeExciteCase,
    StemCase,
    find,
)
from effnet_fast import ops
from parity import (
    BACKENDS,
    BF16,
    FP32,
    MODES,
    SAMPLES,
    Call,
    Dtypes,
    assert_parity,
    assert_same,
    dwconv_call,
    pointwise_call,
    run,
    runs,
    sample,
    squeeze_excite_call,
    stem_call,
    threaded,
    with_gradients,
)

ANY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
ANY_DTYPE = pytest.mark.parametrize("dtypes", [FP32, BF16], ids=str)
Evaluation = Callable[[Any, Dtypes, str], Tensor]
CALLS = 2000  # enough for a leak of one small tensor per call to show
GROWTH = 4 << 20  # bytes; one leaked gradient of x per call would be 7 MB


def assert_independent_of_threads(call: Call, backend: str) -> None:
    """Compares two, three and four threads with the one that tests start with."""
    wanted = with_gradients(call)
    expected = [run(call, backend, wanted=wanted), run(call, backend, wanted=())]
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_same(run(call, backend, wanted=wanted), expected[0])
        assert_same(run(call, backend, wanted=()), expected[1])


@threaded(
    DWCONV_CASES,
    (
        *("c_odd", "7x9_stride_2", "h_gt_chunk", "batch_gt_groups", "batch_0"),
        "b0_c240_28_k5_s1",
    ),
)
@MODES
def test_dwconv_on_any_number_of_threads(
    training: bool, case: DwconvCase, dtypes: Dtypes, backend: str
) -> None:
    assert_independent_of_threads(dwconv_call(case, dtypes, training), backend)


@threaded(
    SQUEEZE_EXCITE_CASES,
    ("c_odd", "r_gt_c", "one_pixel", "hw_gt_chunk", "layers_in_parallel", "b0_c240_28_r10"),
)
def test_squeeze_excite_on_any_number_of_threads(
    case: SqueezeExciteCase, dtypes: Dtypes, backend: str
) -> None:
    assert_independent_of_threads(squeeze_excite_call(case, dtypes), backend)


def pointwise_eval(case: PointwiseCase, dtypes: Dtypes, backend: str) -> Tensor:
    return run(pointwise_call(case, dtypes), backend, wanted=())["y"]


def mbconv_eval(case: MBConvCase, dtypes: Dtypes, backend: str) -> Tensor:
    call = mbconv_blocks.block_call(case, dtypes, training=False)
    return mbconv_blocks.run(call, ops.mbconv, wanted=(), backend=backend)["y"]


def stem_eval(case: StemCase, dtypes: Dtypes, backend: str) -> Tensor:
    return run(stem_call(case, dtypes), backend, wanted=())["y"]


# For `make test`: two shapes of each op.
SOME = {
    pointwise_eval: ("gate_residual_no_act", "b0_expand_c40_240_28"),
    mbconv_eval: ("c_odd_stride_2", "c_gt_tile"),
    stem_eval: ("h_gt_chunk", "b0"),
}
EVALUATIONS = [
    pytest.param(
        *(function, param.values[0]),
        id=f"{function.__name__}-{param.id}",
        marks=pytest.mark.slow if param.id in SOME[function] else pytest.mark.exhaustive,
    )
    for function, params in (
        (pointwise_eval, POINTWISE_CASES),
        (mbconv_eval, MBCONV_CASES),
        (stem_eval, STEM_CASES),
    )
    for param in params
]


@ANY_DTYPE
@pytest.mark.parametrize(("function", "case"), EVALUATIONS)
def test_inference_on_any_number_of_threads(
    function: Evaluation, case: Any, dtypes: Dtypes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but torch's own products, which add up as their threads divide the work."""
    for module, name in ((torch, "mm"), (torch, "bmm")):
        monkeypatch.setattr(module, name, on_one_thread(getattr(module, name)))
    expected = function(case, dtypes, "cpu")
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert_same({"y": function(case, dtypes, "cpu")}, {"y": expected})


def on_one_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **options)
        finally:
            torch.set_num_threads(threads)

    return run


@runs((FP32, BF16), tiers.INSTRUCTION_SETS)
@pytest.mark.parametrize("name", SAMPLES)
def test_two_runs(name: str, dtypes: Dtypes, backend: str) -> None:
    call = sample(name, dtypes)
    wanted = with_gradients(call)
    assert_same(run(call, backend, wanted=wanted), run(call, backend, wanted=wanted))


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_callers_in_several_threads(threads: int) -> None:
    """Workspaces belong to the calling thread, and callers do not disturb each other."""
    torch.set_num_threads(threads)
    calls = [sample(name, dtypes) for name in SAMPLES for dtypes in (FP32, BF16)]
    calls += [
        dwconv_call(find(DWCONV_CASES, name), FP32, training)
        for name in ("b0_c240_28_k5_s1", "b0_c672_14_k5_s2", "batch_0")
        for training in (False, True)
    ]
    expected = [run(call, "cpu", wanted=with_gradients(call)) for call in calls]

    def work(start: int) -> None:
        torch.set_num_threads(threads)
        for step in range(3 * len(calls)):
            index = (start * 5 + step) % len(calls)
            actual = run(calls[index], "cpu", wanted=with_gradients(calls[index]))
            assert_same(actual, expected[index])

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, start) for start in range(4)]:
            future.result()


@pytest.mark.parametrize("name", SAMPLES)
def test_first_call_of_a_thread_may_be_empty(name: str) -> None:
    """A thread's workspace does not exist before a call has needed it."""
    call = sample(name)
    empty = {k: v[:0] for k, v in call.tensors.items() if k in ("x", "gate", "residual")}
    call = call.with_tensors(**empty)
    with ThreadPoolExecutor(1) as pool:
        results = pool.submit(run, call, "cpu", wanted=with_gradients(call)).result()
    assert results["y"].shape[0] == 0


def test_what_is_never_written_is_nan() -> None:
    """Every parity test runs its op so; one whose kernel left an element out would fail."""
    with poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.ones(2, 2, dtype=torch.bfloat16)).isnan().all()
    call = sample("dwconv_eval")
    stock, exact = (run(call, double=double, wanted=())["y"] for double in (False, True))
    y = run(call, "cpu", wanted=())["y"]
    assert_parity({"y": y}, {"y": stock}, {"y": exact}, call.x.dtype)
    y[1, 2, 3, 4] = float("nan")
    with pytest.raises(AssertionError):
        assert_parity({"y": y}, {"y": stock}, {"y": exact}, call.x.dtype)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", tiers.some(SAMPLES, ("dwconv_train", "stem_train")))
def test_memory_does_not_grow(name: str) -> None:
    call = sample(name)
    wanted = with_gradients(call)
    for _ in range(CALLS // 10):
        run(call, "cpu", wanted=wanted)
    gc.collect()
    before = resident_bytes()
    for _ in range(CALLS):
        run(call, "cpu", wanted=wanted)
    gc.collect()
    assert resident_bytes() - before < GROWTH
