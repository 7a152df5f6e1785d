"""Depthwise convolution + BN + SiLU against stock's three operators, on the networks' own shapes.

`pytest benchmarks/bench_dwconv.py --benchmark-only`; parity is checked before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from cases import DWCONV_CASES, LARGE_DWCONV_CASES
from effnet_fast import ops
from parity import check, dwconv_call

SHAPES = [
    p
    for p in (*DWCONV_CASES, *LARGE_DWCONV_CASES)
    if str(p.values[0].name).startswith(("b0", "b7"))
]
CONTESTANTS = ("stock", "fused", "conv_alone")


def _stock(t: dict[str, torch.Tensor], case, training: bool) -> torch.Tensor:
    z = F.conv2d(t["x"], t["weight"], None, case.stride, (case.k - 1) // 2, groups=case.c)
    z = F.batch_norm(z, t["running_mean"], t["running_var"], t["bn_weight"], t["bn_bias"], training)
    return F.silu(z, inplace=True)


def _contestant(
    name: str, t: dict[str, torch.Tensor], case, training: bool
) -> Callable[[], torch.Tensor]:
    if name == "stock":
        return lambda: _stock(t, case, training)
    if name == "conv_alone":
        pad = (case.k - 1) // 2
        return lambda: F.conv2d(t["x"], t["weight"], None, case.stride, pad, groups=case.c)
    return lambda: ops.dwconv_bn_silu(**t, stride=case.stride, training=training, backend="cpu")


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("case", SHAPES)
def test_inference(benchmark, case, contestant: str) -> None:
    call = dwconv_call(case)
    check(call, "cpu", wanted=())
    benchmark.group = case.name
    with torch.inference_mode():
        benchmark(_contestant(contestant, call.tensors, case, False))


@pytest.mark.parametrize("contestant", CONTESTANTS[:2])
@pytest.mark.parametrize("case", SHAPES)
def test_training(benchmark, case, contestant: str) -> None:
    """Forward and backward."""
    call = dwconv_call(case, training=True)
    check(call, "cpu")
    tensors = {
        k: v.clone().requires_grad_(not k.startswith("running")) for k, v in call.tensors.items()
    }
    forward = _contestant(contestant, tensors, case, True)
    grad_y = torch.randn_like(forward())
    inputs = [t for t in tensors.values() if t.requires_grad]
    benchmark.group = f"{case.name} training"
    benchmark(lambda: torch.autograd.grad(forward(), inputs, grad_y))
