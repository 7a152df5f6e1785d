"""torch.nn.SyncBatchNorm: with whom it normalises, and its forward on a CPU.

PyTorch's own forward refuses CPU tensors where there are several processes. Fused passes run there,
and so does what they cannot stand in for: `served` gives the layers that a module calls itself the
reference's forward for the time of a call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from effnet_fast.ops.statistics import update
from effnet_fast.reference.sync_batch_norm import sync_batch_norm


def group_of(bn: Any) -> Any:
    """The process group over whose batches it normalises in this mode; None for its own batch."""
    if not (bn.training and dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def forward(bn: Any, x: Tensor) -> Tensor:
    """y = bn(x) by the batches of all processes, as its own forward computes it on a GPU.

    Args:
        bn: an nn.SyncBatchNorm with a group, see `group_of`.
        x: [N,C,...]; N may be 0.
    """
    bn._check_input_dim(x)
    bn._check_non_zero_input_channels(x)
    momentum = bn.momentum or 0.0
    if bn.track_running_stats:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / bn.num_batches_tracked.item()
    y, mean, var, correction = sync_batch_norm(
        x, bn.weight, bn.bias, eps=bn.eps, group=group_of(bn)
    )
    factor = correction.item()
    if bn.track_running_stats and bn.running_mean is not None and factor > 0:
        update(bn.running_mean, bn.running_var, mean, var, factor, momentum)
    return y


@contextlib.contextmanager
def served(module: nn.Module, x: Tensor) -> Iterator[None]:
    """Within it the module's forward may call its SyncBatchNorms for CPU tensors, as x is."""
    found: list[nn.Module] = []
    # Tracers pass proxies, which are no tensors.
    is_one_of_several = dist.is_available() and dist.is_initialized() and isinstance(x, Tensor)
    if is_one_of_several and x.device.type == "cpu":
        found = [
            bn
            for bn in module.children()
            if type(bn) is nn.SyncBatchNorm and "forward" not in bn.__dict__ and group_of(bn)
        ]
    for bn in found:
        bn.__dict__["forward"] = partial(forward, bn)
    try:
        yield
    finally:
        for bn in found:
            bn.__dict__.pop("forward", None)
