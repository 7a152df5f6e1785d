"""How often the fused forward goes from one file into another, and what it asks on its way.

What a call needs to know is decided once and carried along: a hop that comes back for a detail
costs time in small networks, and a reader his thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import effnet_fast
from effnet_fast.modules.layers import MBConv, MBConvConfig

ROOTS = (str(Path(effnet_fast.__file__).parent), "triton_kernels")
EVAL, TRAINING = 34, 52  # once 112 and 234, and 44 and 99 with a reading at every call


def hops(call: Callable[[], Any]) -> list[str]:
    """The Python functions of the package that `call` enters from another file, in order."""
    found = []

    def look(frame: FrameType, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        caller = frame.f_back.f_code.co_filename if frame.f_back else ""
        if event == "call" and path != caller and any(root in path for root in ROOTS):
            found.append(f"{path}:{frame.f_code.co_name}")

    sys.setprofile(look)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            call()
    finally:
        sys.setprofile(None)
    return found


def block_and_input() -> tuple[MBConv, torch.Tensor]:
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    return MBConv(MBConvConfig(6, 3, 1, 8, 8), 0.1, nn.BatchNorm2d), x


def test_eval_hops() -> None:
    block, x = block_and_input()
    block.eval()
    with torch.no_grad():
        for _ in range(3):  # imports the launchers, and remembers what the block is
            block(x)
        found = hops(lambda: block(x))
    assert len(found) <= EVAL, "\n".join(found)


def test_training_hops() -> None:
    block, x = block_and_input()
    x.requires_grad_()
    for _ in range(3):
        block(x).sum().backward()
    found = hops(lambda: block(x).sum().backward())
    assert len(found) <= TRAINING, "\n".join(found)


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_whether_a_transform_is_at_work_is_asked_once(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x = block_and_input()
    asked: list[int] = []
    original = torch._C._functorch.get_dynamic_layer_stack_depth
    monkeypatch.setattr(
        torch._C._functorch,
        "get_dynamic_layer_stack_depth",
        lambda: asked.append(1) or original(),
    )
    with effnet_fast.use_backend(backend), torch.no_grad():
        block.eval()(x)
    assert len(asked) == 1
