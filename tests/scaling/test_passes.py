"""The traffic model: against what PyTorch's operators touch, and against published limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effnet_fast.models import VARIANTS, EfficientNet
from effnet_fast.scaling import count, passes, traffic
from networks import TINY

COPY_RATE = 4.3e12  # bytes a second that the images a second below are of
# bf16, weights left out: images a second at that rate, stage by stage of the same accounting.
LIMITS = {
    "b0": {"stock": 45e3, "layer_fused": 156e3, "block_fused": 302e3},
    "b4": {"stock": 6.0e3, "layer_fused": 21.0e3, "block_fused": 37.7e3},
    "b7": {"stock": 1.01e3, "layer_fused": 3.56e3, "block_fused": 6.1e3},
}
TRAINING_LIMITS = {
    "b0": {"stock": 13.6e3, "fast": 38.0e3},
    "b4": {"stock": 1.8e3, "fast": 5.2e3},
    "b7": {"stock": 310.0, "fast": 889.0},
}


class Touched(TorchDispatchMode):
    """Adds up the elements of images and feature maps that each operator reads and writes."""

    VIEWS = ("detach", "view", "_unsafe_view", "flatten", "t")

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in self.VIEWS:
            tensors = [t for t in tree_leaves((args, out)) if _is_map(t)]
            self.elements[name] = self.elements.get(name, 0) + sum(t.numel() for t in tensors)
        return out


def _is_map(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and min(value.shape[2:]) > 5


def test_stock_is_what_pytorch_touches() -> None:
    """Every operator of a stock forward, told apart by name, on maps of more than 5x5."""
    side, batch = 192, 3
    with torch.device("meta"):
        model = EfficientNet(TINY, backend="reference").eval()
        x = torch.empty(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), Touched() as touched:
        model(x)
    counted: dict[str, int] = {}
    for row in traffic(TINY, "inference", "stock", side, batch=batch, element_size=1):
        counted[row.name] = counted.get(row.name, 0) + row.bytes
    seen = {name: elements for name, elements in touched.elements.items() if elements}
    assert seen == {
        "conv2d": counted["convolution"],
        "batch_norm": counted["bn"],
        "silu_": counted["silu"],
        "adaptive_avg_pool2d": counted["squeeze"] + counted["pool"],
        "mul": counted["scale"],
        "add_": counted["residual"],
    }


@pytest.mark.parametrize("name", LIMITS)
def test_published_limits(name: str) -> None:
    modes = {"inference": LIMITS[name], "training": TRAINING_LIMITS[name]}
    for mode, limits in modes.items():
        for plan, images in limits.items():
            rows = traffic(VARIANTS[name], mode, plan, element_size=2)
            moved = sum(row.bytes for row in rows if row.op != "weights")
            assert moved == pytest.approx(COPY_RATE / images, rel=0.04), (mode, plan)


@pytest.mark.parametrize(
    ("plan", "forward", "backward"), [("fast", 5, 11), ("stock", 17, 32), ("lean", 5, 12)]
)
def test_expanded_passes(plan: str, forward: int, backward: int) -> None:
    """How often the expanded tensors are read or written in training."""
    rows = passes.PLANS["training", plan].block
    first = next(i for i, row in enumerate(rows) if row.name in ("finish_bwd", "drop_path_bwd"))
    if plan == "lean":
        first = next(i for i, row in enumerate(rows) if row.name == "recompute")

    def expanded(part: tuple[passes.Pass, ...]) -> int:
        return sum(letter in "ed" for row in part for letter in row.reads + row.writes)

    assert expanded(rows[:first]) == forward
    assert expanded(rows[first:]) == backward


def test_block_by_hand() -> None:
    """Stage 2 of B0 at 224: 16 -> 24 channels, 96 expanded, 112 -> 56 and then 56 -> 56."""
    x, e, d, y = 16 * 112**2, 96 * 112**2, 96 * 56**2, 24 * 56**2
    later = 144 * 56**2
    rows = traffic(VARIANTS["b0"], "inference", "layer_fused", element_size=2)
    moved = sum(row.bytes for row in rows if row.stage == 2 and row.op != "weights")
    assert moved == 2 * ((x + 2 * e + 2 * d + y) + (y + 2 * later + 2 * later + y + y))


@pytest.mark.parametrize("plan", passes.PLANS)
def test_batch_dtype_and_weights(plan: tuple[str, str]) -> None:
    def total(op: str, **options: int) -> int:
        rows = traffic(TINY, *plan, **options)
        return sum(row.bytes for row in rows if (row.op == "weights") == (op == "weights"))

    one = total("maps")
    assert total("maps", batch=5) == 5 * one
    assert total("maps", element_size=2) * 2 == one
    repeats = passes.PLANS[plan].weight_passes
    parameters = count(TINY).parameters
    assert total("weights", batch=5) == repeats * 4 * parameters
    assert total("weights", weight_size=2) == repeats * 2 * parameters


def test_only_blocks_with_a_residual_carry_one() -> None:
    """Stage 1 of B0 is one block of 32 -> 16 channels, stage 2 has a block of 24 -> 24."""
    rows = traffic(VARIANTS["b0"], "training", "stock")
    found = {row.stage for row in rows if row.name.startswith(("residual", "drop_path"))}
    assert found == {2, 3, 4, 5, 6}


def test_fused_plans_move_less() -> None:
    for variant in VARIANTS.values():
        for mode in passes.MODES:
            moved = [
                sum(r.bytes for r in traffic(variant, mode, plan)) for plan in passes.plans(mode)
            ]
            if mode == "inference":
                assert moved == sorted(moved, reverse=True)
            else:
                stock, fast, lean = moved
                assert fast < lean < stock


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="no plan 'fast' of mode 'inference'; there are inference"):
        traffic(TINY, "inference", "fast")
    with pytest.raises(ValueError, match="batch must be an int of at least 1"):
        traffic(TINY, batch=0)
