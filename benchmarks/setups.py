"""What a contest of networks gives to each contestant, and the step that PyTorch's run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.limits import DTYPES
from effnet_fast.models import Variant

Runner = Callable[[], object]


@dataclass(frozen=True)
class Setup:
    """What a peer is given.

    Args:
        variant: the network.
        model: effnet_fast's module tree with stock's forward (backend "reference"), fp32, in
            channels_last, on the device and in the mode of the contest.
        x: images [N,3,H,W], fp32, channels_last, on the device.
        dtype, device, mode: of the contest.
    """

    variant: Variant
    model: nn.Module
    x: Tensor
    dtype: str
    device: str
    mode: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def network_step(model: nn.Module, x: Tensor, mode: str, amp: torch.dtype | None = None) -> Runner:
    """One inference, or one forward and backward of a cross entropy; with autocast to `amp`."""
    labels = torch.arange(len(x), device=x.device) % 1000

    def context() -> Any:
        return torch.autocast(x.device.type, amp, enabled=amp is not None)

    def infer() -> Tensor:
        with torch.inference_mode(), context():
            return model(x)

    def train() -> Tensor:
        model.zero_grad(set_to_none=True)
        with context():
            loss = F.cross_entropy(model(x).float(), labels)
        loss.backward()
        return loss.detach()

    return infer if mode == "inference" else train


def cast(setup: Setup) -> tuple[nn.Module, Tensor]:
    """Model and input in the contest's dtype, copies."""
    model = copy.deepcopy(setup.model).to(setup.torch_dtype)
    return model, setup.x.to(setup.torch_dtype)
