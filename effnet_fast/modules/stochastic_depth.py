"""Stochastic depth: in training some images skip a block's body.

Source: Huang et al., "Deep Networks with Stochastic Depth" (arXiv 1603.09382).
"""

from __future__ import annotations

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

# What is dropped in training: rows by one Bernoulli draw for each or for all; rows by a number
# between 0 and 1 for each, as efficientnet_pytorch does; single elements, as transformers does; all
# at once by dropping a number in fp32, as NVIDIA does.
ROW, BATCH, UNIFORM, ELEMENTS, ONCE = "row", "batch", "uniform", "elements", "once"


def _factors(size: list[int], p: float, x: Tensor) -> Tensor:
    """0 with probability p and 1 / (1 - p) else, drawn in x's dtype."""
    keep = 1.0 - p
    noise = torch.empty(size, dtype=x.dtype, device=x.device)
    noise = noise.bernoulli_(keep)
    if keep > 0.0:
        noise.div_(keep)
    return noise


def stochastic_depth(x: Tensor, p: float, mode: str, training: bool = True) -> Tensor:
    """Zeroes rows of x [N,...] with probability p in training, and divides the others by 1 - p.

    One Bernoulli draw per row (mode "row") or one per call (mode "batch"), in x's dtype; none
    when p is 0 or outside training, where x itself is returned.

    Raises:
        ValueError: p outside [0, 1], or an unknown mode.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p, the drop probability, must be between 0 and 1, got {p}")
    if mode not in ["batch", "row"]:  # as TorchScript can read it
        raise ValueError(f"mode must be one of 'batch', 'row', got '{mode}'")
    if not training or p == 0.0:
        return x
    rows = x.shape[0] if mode == "row" else 1
    return x * _factors([rows] + [1] * (x.dim() - 1), p, x)


torch.fx.wrap("stochastic_depth")


def drop(x: Tensor, p: float, mode: str) -> Tensor:
    """x [N,C,H,W] with a part dropped, and the rest scaled by 1 / (1 - p), in any of the modes."""
    if mode == ELEMENTS:
        return F.dropout(x, p)
    if mode == ONCE:
        return x * F.dropout(torch.ones((), device=x.device), p)
    if mode != UNIFORM:
        return stochastic_depth(x, p, mode)
    keep = 1.0 - p
    drawn = keep + torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device)
    return x / keep * drawn.floor()


def row_scale(x: Tensor, p: float, mode: str) -> Tensor:
    """The factor [N] in fp32 of each image by which `drop` drops rows of x [N,C,H,W]."""
    if mode == ROW and 0.0 < p <= 1.0:
        return _factors([x.shape[0]], p, x).float()
    dtype = torch.float32 if mode == ONCE else x.dtype
    ones = torch.ones(x.shape[0], 1, 1, 1, dtype=dtype, device=x.device)
    return drop(ones, p, mode).flatten().float()


class StochasticDepth(nn.Module):
    """See `stochastic_depth`.

    Args:
        p: drop probability.
        mode: "row" draws per sample, "batch" per call.
    """

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p = p
        self.mode = mode

    def forward(self, input: Tensor) -> Tensor:
        return stochastic_depth(input, self.p, self.mode, self.training)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(p={self.p}, mode={self.mode})"
