"""What only a GPU can show: sizes, streams, graphs, the compiler, and NVIDIA's own checker."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cases import DWCONV_CASES, SQUEEZE_EXCITE_CASES, SqueezeExciteCase, find
from effnet_fast import ops
from effnet_fast.backends import can_run
from parity import (
    BF16,
    FP32,
    Call,
    assert_parity,
    assert_same,
    dwconv_call,
    on_device,
    run,
    squeeze_excite_call,
)
from tolerances import assert_no_worse_than

REASON = can_run("cuda", "dwconv_bn_silu")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=REASON or "")]
CHECKED = "c_odd or c_gt_block_stride_2"  # small cases with tails and several blocks


def calls() -> dict[str, Call]:
    dwconv = find(DWCONV_CASES, "b0_c240_28_k5_s1")
    return {
        "dwconv_eval": dwconv_call(dwconv, BF16),
        "dwconv_train": dwconv_call(dwconv, BF16, training=True),
        "squeeze_excite": squeeze_excite_call(find(SQUEEZE_EXCITE_CASES, "b0_c240_28_r10"), BF16),
    }


ANY_CALL = pytest.mark.parametrize("name", list(calls()))


def on_gpu(call: Call) -> Call:
    device = torch.device("cuda")
    tensors = {k: None if t is None else on_device(t, device) for k, t in call.tensors.items()}
    return call.with_tensors(**tensors)


def step_of(call: Call) -> tuple[Callable[[], list[Tensor]], Tensor]:
    """A function that gives output and gradients for what is in x then, and x."""
    call = on_gpu(call)
    leaves = {k: None if t is None else t.clone() for k, t in call.tensors.items()}
    inputs = [leaves[name].requires_grad_() for name in call.differentiable]

    def step() -> list[Tensor]:
        y = getattr(ops, call.op)(**leaves, **call.options, backend="cuda")
        return [y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))]

    return step, leaves["x"]


@ANY_CALL
def test_two_runs_are_bitwise_equal(name: str) -> None:
    call = calls()[name]
    assert_same(run(call, "cuda"), run(call, "cuda"))


@ANY_CALL
def test_two_streams(name: str) -> None:
    """Each stream's work follows what that stream has done, and no other's."""
    steps = [step_of(calls()[name]) for _ in range(2)]
    expected, source = steps[0][0](), steps[0][1].detach().clone()
    for _, x in steps:
        x.data.zero_()
    torch.cuda.synchronize()
    results = []
    for step, x in steps:
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(50_000_000)  # cycles: a kernel on another stream would see zeros
            x.data.copy_(source)
            results.append(step())
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@ANY_CALL
def test_graph_replay_with_changed_inputs(name: str) -> None:
    step, x = step_of(calls()[name])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    replayed = [tensor.clone() for tensor in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


@ANY_CALL
def test_compiled_as_eager(name: str) -> None:
    """Forward and backward, by value."""
    step, _ = step_of(calls()[name])
    expected = step()
    actual = torch.compile(step)()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@ANY_CALL
def test_no_call_waits_for_the_device(name: str) -> None:
    """PyTorch's own calls. Those of the extension it cannot see; that they do not wait either is
    shown by the capture of a graph, in which waiting is an error."""
    step, _ = step_of(calls()[name])
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device alone")
def test_the_current_device_is_left_alone() -> None:
    call = dwconv_call(find(DWCONV_CASES, "c_odd"), FP32)
    tensors = {k: None if t is None else t.to("cuda:1") for k, t in call.tensors.items()}
    torch.cuda.set_device(0)
    y = ops.dwconv_bn_silu(**tensors, backend="cuda")
    assert y.device.index == 1
    assert torch.cuda.current_device() == 0
    assert torch.equal(y.cpu(), run(call, "cuda", wanted=())["y"])


C, SIDE = 64, 112  # of a batch of more than 2^31 elements


def large_batch(tensors: int) -> Tensor:
    """x of more than 2^31 elements, zeros but for its last two images; bf16, channels_last.

    Skips the test where the device has no room for so many tensors of that size.
    """
    n = 2**31 // (C * SIDE * SIDE) + 3
    free, _ = torch.cuda.mem_get_info()
    needed = tensors * 2 * n * C * SIDE * SIDE
    if free < needed:
        # Tensors over 2^31 elements are the point: smaller ones would show nothing.
        pytest.skip(f"{free / 2**30:.0f} GiB free, {needed / 2**30:.0f} needed")
    x = torch.empty(
        n, C, SIDE, SIDE, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last
    ).zero_()
    assert x.numel() > 2**31
    x[-2:].normal_(generator=torch.Generator("cuda").manual_seed(0))
    return x


def with_c(call: Call) -> dict[str, Tensor | None]:
    """The call's parameters on the GPU, repeated to C channels."""
    call = on_gpu(call)
    return {
        name: None if t is None else t.repeat(C // t.shape[0], *(1 for _ in t.shape[1:]))
        for name, t in call.tensors.items()
        if name != "x"
    }


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_dwconv_of_more_than_2_31_elements(grad: bool) -> None:
    """The last images of a large batch give what they give alone; so does the weight's gradient,
    to which images of zeros add nothing."""
    x = large_batch(5)
    parameters = with_c(dwconv_call(find(DWCONV_CASES, "c_eq_vector"), BF16))

    def results(x: Tensor) -> list[Tensor]:
        if not grad:
            with torch.no_grad():
                return [ops.dwconv_bn_silu(x, **parameters, backend="cuda")[-2:].clone()]
        x = x.detach().requires_grad_()
        weight = parameters["weight"].detach().requires_grad_()
        y = ops.dwconv_bn_silu(x, **parameters | {"weight": weight}, backend="cuda")
        grad_x, grad_weight = torch.autograd.grad(y, [x, weight], x.detach())
        return [y.detach()[-2:].clone(), grad_x[-2:].clone(), grad_weight]

    small = results(x[-2:].clone(memory_format=torch.channels_last))
    large = results(x)
    for a, b in zip(large[:2], small[:2], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(large[2:], small[2:], strict=True):
        torch.testing.assert_close(a, b)  # summed in another order, then rounded to bf16


def test_statistics_of_more_than_2_31_elements() -> None:
    """Against float64 on the device, of what the kernel has written."""
    x = large_batch(6)
    x[-2:] += 3  # a mean that two images of 2.7 million elements a channel move
    weight = torch.ones(C, 1, 3, 3, device="cuda", dtype=torch.bfloat16)
    z, mean, var = torch.ops.effnet_fast.dwconv_statistics(x, weight, 1, [1] * 4, "cuda")
    last = z[-2:].double()
    assert torch.equal(z[:2], torch.zeros_like(z[:2]))
    count = z.numel() / C
    exact_mean = last.sum((0, 2, 3)) / count
    exact_var = last.square().sum((0, 2, 3)) / count - exact_mean.square()
    stock_var, stock_mean = torch.var_mean(z.float(), (0, 2, 3), correction=0)
    assert_no_worse_than(mean, stock_mean, exact_mean)
    assert_no_worse_than(var, stock_var, exact_var)


def test_squeeze_excite_of_more_than_2_31_elements() -> None:
    """The last images of a large batch, held to the reference of them alone."""
    x = large_batch(5)
    case = SqueezeExciteCase("large", 2, C, SIDE, SIDE, 4)
    call = squeeze_excite_call(case, BF16)
    call = on_gpu(call).with_tensors(x=x[-2:].clone(memory_format=torch.channels_last))
    parameters = {name: t for name, t in call.tensors.items() if name != "x"}
    leaf = x.detach().requires_grad_()
    y = ops.squeeze_excite(leaf, **parameters, backend="cuda")
    (grad_x,) = torch.autograd.grad(y, leaf, x)
    actual = {"y": y.detach()[-2:].clone(), "grad x": grad_x[-2:].clone()}
    rest = {"wanted": ("x",), "grad_y": x[-2:]}
    assert_parity(actual, run(call, **rest), run(call, double=True, **rest), torch.bfloat16)


def test_launches_of_different_shared_memory_side_by_side() -> None:
    """A kernel's limit of shared memory is the device's: no launch lowers it for another's."""
    calls = [
        on_gpu(squeeze_excite_call(SqueezeExciteCase("r", 1, 8, 2, 2, r), FP32))
        for r in (3200, 4800, 6000)
    ]

    def launch(call: Call) -> None:
        for _ in range(500):
            ops.squeeze_excite(**call.tensors, backend="cuda")

    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(launch, calls))  # raises what a thread did
    torch.cuda.synchronize()


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    """The parity tests of small shapes under NVIDIA's checker."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not on PATH")
    folder = Path(__file__).parent
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-k"]
    tests += [f"test_matches_reference and ({CHECKED}) and bfloat16", str(folder)]
    # The caching allocator would hide an overflow from one tensor into the next.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "86", sys.executable, *tests],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder.parents[1],
    )
    text = done.stdout + done.stderr
    if "Device not supported" in text:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, text[-4000:]


def test_statistics_match_those_of_the_whole_batch() -> None:
    """Moments over many blocks: against float64 on the device."""
    x = torch.randn(64, 32, 112, 112, device="cuda").contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(32, 1, 3, 3, device="cuda")
    weight[:, :, 1, 1] = 1
    sides = [1, 1, 1, 1]
    z, mean, var = torch.ops.effnet_fast.dwconv_statistics(x, weight, 1, sides, "cuda")
    assert torch.equal(z, x)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    stock_var, stock_mean = torch.var_mean(x, (0, 2, 3), correction=0)
    assert_no_worse_than(mean, stock_mean, exact_mean)
    assert_no_worse_than(var, stock_var, exact_var)
