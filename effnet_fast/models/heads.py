"""What follows the features: global pooling, dropout and the classifier.

Source: names of the poolings as in timm/layers/adaptive_avgmax_pool.py,
https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AvgMaxPool2d(nn.Module):
    """Half the sum of mean and maximum, x [N,C,H,W] -> [N,C,1,1]."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (F.adaptive_avg_pool2d(x, 1) + F.adaptive_max_pool2d(x, 1))


class CatAvgMaxPool2d(nn.Module):
    """Mean and maximum one after the other, x [N,C,H,W] -> [N,2C,1,1]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)), 1)


# name: what makes the pooling, and its output's channels over its input's
POOLS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "avg": (lambda: nn.AdaptiveAvgPool2d(1), 1),
    "max": (lambda: nn.AdaptiveMaxPool2d(1), 1),
    "avgmax": (AvgMaxPool2d, 1),
    "catavgmax": (CatAvgMaxPool2d, 2),
    "": (nn.Identity, 1),
}


def check_head(num_classes: int, global_pool: str) -> None:
    """Raises ValueError for a pooling that does not exist, or none of it before a classifier."""
    if global_pool not in POOLS:
        raise ValueError(
            f"global_pool must be one of {', '.join(map(repr, POOLS))}, got {global_pool!r}"
        )
    if num_classes and not global_pool:
        raise ValueError(
            f"global_pool='' leaves maps for a classifier of {num_classes} classes: it needs "
            "num_classes=0"
        )


def make_classifier(
    in_features: int, num_classes: int, dropout: float, in_place: bool = True
) -> nn.Sequential:
    """Dropout, then a linear layer, or nothing where num_classes is 0."""
    return nn.Sequential(
        nn.Dropout(p=dropout, inplace=in_place),
        nn.Linear(in_features, num_classes) if num_classes else nn.Identity(),
    )
