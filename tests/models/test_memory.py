"""memory="fast" and "lean" of networks and of single blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import tiers
from allocations import peak_bytes, saved_bytes, train_step
from effnet_fast import EfficientNet, use_backend
from effnet_fast.models import custom_variant
from effnet_fast.modules.layers import MBConv

TINY = custom_variant(width=0.5, depth=0.5)
PEAK = {"cpu": (2, 96), "cuda": (64, 224)}  # images and their side
SHARES = {"fast": 0.40, "lean": 0.25}  # of what stock saves


def blocks(model: EfficientNet) -> list[MBConv]:
    return [module for module in model.modules() if isinstance(module, MBConv)]


def images(side: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, side, side, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def step(model: EfficientNet) -> list[Tensor]:
    """Loss, gradients and buffers of one step, with the same random draws each time."""
    torch.manual_seed(0)
    loss = model(images()).square().mean()
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    return [loss.detach(), *grads, *(b.clone() for b in model.buffers())]


def test_memory_of_a_network_is_that_of_its_blocks() -> None:
    model = EfficientNet(TINY, memory="lean")
    assert {block.memory for block in blocks(model)} == {"lean"}
    model.memory = "fast"
    assert {block.memory for block in blocks(model)} == {"fast"}
    blocks(model)[1].memory = "lean"
    kept = [block.memory for block in blocks(copy.deepcopy(model))]
    assert kept == ["fast", "lean", *["fast"] * (len(kept) - 2)]


def test_unknown_memory_changes_nothing() -> None:
    model = EfficientNet(TINY)
    with pytest.raises(ValueError, match="memory must be one of fast, lean, got 'small'"):
        model.memory = "small"
    assert model.memory == "fast"


@pytest.mark.parametrize("autocast", [False, True])
def test_lean_gives_the_bits_of_fast(autocast: bool) -> None:
    model = EfficientNet(TINY).train()
    lean = copy.deepcopy(model)
    lean.memory = "lean"
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results = [step(m) for m in (model, lean)]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("size", tiers.networks(f"b{i}" for i in range(8)))
def test_what_is_saved(size: str) -> None:
    """By hooks, at a side so small that vectors weigh more than at the network's own."""
    with torch.device("meta"):
        model = EfficientNet(size).train()
    model.to_empty(device="cpu")
    x = images(96)
    with use_backend("reference"):
        stock = saved_bytes(model, x)
    for memory, share in SHARES.items():
        model.memory = memory
        assert saved_bytes(model, x) <= share * stock, memory


def step_peak(model: EfficientNet, device: str) -> int:
    """Bytes of a training step at its peak, above what stands before it."""
    batch, side = PEAK[device]
    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    x = x.to(device, memory_format=torch.channels_last)
    model = model.to(device, memory_format=torch.channels_last).train()
    train_step(model, x)  # what stays: gradients, workspaces, compiled kernels
    if device == "cpu":
        return peak_bytes(lambda: train_step(model, x))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train_step(model, x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "amp"),
    [
        pytest.param("cpu", None, id="cpu-fp32"),
        *(
            pytest.param("cuda", amp, id=f"cuda-{amp}", marks=pytest.mark.gpu)
            for amp in (None, torch.bfloat16, torch.float16)
        ),
    ],
)
def test_peak_of_a_training_step(device: str, amp: torch.dtype | None) -> None:
    """Of B0, below stock's; less still with "lean"."""
    if device == "cuda" and not torch.cuda.is_available():
        # Another device's memory would stand for nothing.
        pytest.skip("there is no CUDA device")
    with torch.autocast(device, amp or torch.bfloat16, enabled=amp is not None):
        stock = step_peak(EfficientNet("b0", backend="reference"), device)
        fast, lean = (step_peak(EfficientNet("b0", memory=m), device) for m in SHARES)
    assert lean < fast < stock, f"lean {lean / stock:.2f}, fast {fast / stock:.2f} of stock's"


def test_a_residual_of_another_shape_is_stocks_error() -> None:
    """The fused block would read beyond its input."""
    model = EfficientNet(TINY).train()
    wide = copy.deepcopy(blocks(model)[1])
    wide.use_res_connect = True
    x = torch.randn(2, wide.block[0][0].in_channels, 8, 8)
    with pytest.raises(RuntimeError, match="must match the size of tensor"):
        wide(x.contiguous(memory_format=torch.channels_last))
