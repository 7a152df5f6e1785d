"""Whole networks: fused against stock, and stock against torchvision.

`pytest benchmarks/bench_network.py --benchmark-only`. Contestants alternate in bursts.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision

import effnet_fast
from effnet_fast import timing

SIZES = (("b0", 224), ("b4", 380), ("b7", 600))


def _network(module: torch.nn.Module, x: torch.Tensor, backend: str) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        with torch.inference_mode(), effnet_fast.use_backend(backend):
            return module(x)

    return call


def _pair(size: str, resolution: int) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    ours = getattr(effnet_fast, f"efficientnet_{size}")().eval()
    theirs = getattr(torchvision.models, f"efficientnet_{size}")().eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, resolution, resolution).to(memory_format=torch.channels_last)
    layout = {"memory_format": torch.channels_last}
    return ours.to(**layout), theirs.to(**layout), x


@pytest.mark.parametrize("contestant", ["stock", "fused"])
@pytest.mark.parametrize(("size", "resolution"), SIZES)
def test_inference(benchmark, size: str, resolution: int, contestant: str) -> None:
    ours, _, x = _pair(size, resolution)
    fused, stock = _network(ours, x, "auto"), _network(ours, x, "reference")
    torch.testing.assert_close(fused(), stock(), rtol=1e-3, atol=1e-3 * stock().abs().max().item())
    benchmark.group = size
    benchmark(fused if contestant == "fused" else stock)


def test_stock_is_as_fast_as_torchvision(benchmark) -> None:
    """The yardstick of every ratio: our module tree unfused, within 3% of torchvision's."""
    ours, theirs, x = _pair("b0", 224)
    calls = {"stock": _network(ours, x, "reference"), "torchvision": _network(theirs, x, "auto")}
    times = benchmark.pedantic(lambda: timing.measure(calls, rounds=9), rounds=1)
    ratio = times["stock"].median / times["torchvision"].median
    benchmark.extra_info["stock / torchvision"] = ratio
    assert abs(ratio - 1) <= 0.03, f"stock takes {ratio:.3f} of torchvision's time"
