"""BatchNorm's running statistics, as the ops move them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cycles import left_in_cycles
from effnet_fast.modules.layers import MBConv, MBConvConfig
from effnet_fast.ops.call import Norm
from effnet_fast.ops.statistics import Moves


@pytest.mark.parametrize("momentum", [0.1, 0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_infinite_running_statistics_stay_infinite(dtype: torch.dtype, momentum: float) -> None:
    """As stock's, whatever their dtype and layout; the others move as stock's do."""
    z = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    given = torch.tensor([[0.5, math.inf, -1.5], [math.inf, 2.25, 0.75]]).to(dtype)
    stock = given.clone()
    F.batch_norm(z.to(dtype), *stock, training=True, momentum=momentum)
    wide = z.to(dtype).float()
    batch = wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)
    for moved in (given.clone(), given.t().contiguous().t()):
        layer, norm = (z, None, None, *moved), Norm(True, momentum, 1e-5)
        move = Moves((norm, layer, (4, 3, 5, 5)))
        move(batch)
        move(batch)  # once for all
        torch.testing.assert_close(moved, stock)


def test_a_step_leaves_no_cycles() -> None:
    """Garbage that counting references does not free stays until the collector runs."""
    block = MBConv(MBConvConfig(6, 3, 1, 8, 8), 0.0, nn.BatchNorm2d)
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    assert left_in_cycles(lambda: block(x).sum().backward()) == []
