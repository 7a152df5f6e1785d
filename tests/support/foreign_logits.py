"""Logits of a network beside those of another package's with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from networks import CALIBRATION_IMAGES, random_images, rms
from tolerances import assert_no_worse_than


def run(model: nn.Module, x: Tensor) -> Tensor:
    """The logits; transformers wraps them."""
    with torch.inference_mode():
        y: Any = model(x)
    logits: Tensor = getattr(y, "logits", y)
    return logits


def _run_all(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    return torch.cat([run(model, x) for x in batches])


def assert_same_logits(ours: nn.Module, theirs: nn.Module, sides: Sequence[int]) -> None:
    """The same at every side by the rule of parity, and in float64; turns both to float64."""
    calibrated = random_images(CALIBRATION_IMAGES, max(sides), seed=1)[:3]
    batches = [calibrated[:, :, :side, :side] for side in sides]
    layouts = torch.contiguous_format, torch.channels_last
    actual = _run_all(ours, batches)
    stock = [_run_all(theirs, [x.to(memory_format=way) for x in batches]) for way in layouts]
    batches = [x.double() for x in batches]
    exact = _run_all(theirs.double(), batches)
    worse = max(stock, key=lambda logits: rms(logits - exact))
    assert_no_worse_than(actual, worse, exact)
    assert rms(exact[0] - exact[1]) > 100 * rms(worse - exact)  # images differ
    assert rms(_run_all(ours.double(), batches) - exact) < 1e-10 * rms(exact)
