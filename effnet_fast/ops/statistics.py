"""BatchNorm's running statistics in training."""

from __future__ import annotations

import torch
from torch import Tensor

from effnet_fast.backends import native
from effnet_fast.ops.registration import LIBRARY


def _move(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    correction: float,
    momentum: float,
) -> None:
    moved = [t for t in (running_mean, running_var) if not t.is_inference()]
    torch.autograd.graph.increment_version(moved)
    native.load().move_statistics(
        mean.numel(), mean.data_ptr(), var.data_ptr(),
        running_mean.data_ptr(), running_var.data_ptr(), correction, momentum,
    )  # fmt: skip


# No backend: the CPU alone has it.
LIBRARY.define(
    "move_statistics(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, "
    "float correction, float momentum) -> ()"
)
LIBRARY.impl("move_statistics", _move, "CPU")
torch.library.register_fake("effnet_fast::move_statistics", lambda *_: None, lib=LIBRARY)
move_op = torch.ops.effnet_fast.move_statistics.default


def update_running_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float,
) -> None:
    """Moves the running statistics [C] as BatchNorm does, in place, the variance unbiased.

    Args:
        running_mean, running_var: both None to do nothing.
        mean, var: the batch's, the variance biased, fp32.
        count: values per channel in the batch; nothing moves where there are none.
        momentum: share of the batch's statistics.
    """
    if running_mean is None or running_var is None or count == 0:
        return
    correction = count / (count - 1) if count > 1 else 1.0
    with torch.no_grad():
        if mean.device.type == "cpu" and all(
            v.dtype is torch.float32 and v.is_contiguous() and v.device == mean.device
            for v in (running_mean, running_var)
        ):
            move_op(running_mean, running_var, mean, var, correction, momentum)
            return
        for running, batch in ((running_mean, mean), (running_var, var * correction)):
            # Not lerp, which makes NaN of an infinite statistic.
            moved = running.float().mul_(1.0 - momentum).add_(batch, alpha=momentum)
            if moved is not running:
                running.copy_(moved)
