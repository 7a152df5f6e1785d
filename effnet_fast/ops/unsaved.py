"""Inputs of an autograd Function that its backward does not read: biases.

PyTorch saves no bias for backward, so that a bias may change in between, as by an optimizer that
steps before another graph's backward. A gradient that is differentiated again, or one of a batch,
is computed from all inputs once more; a bias that has changed by then raises PyTorch's error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Biases = tuple[Tensor | None, ...]


def _version(bias: Tensor | None) -> int:
    return 0 if bias is None or bias.is_inference() else bias._version


def keep(ctx: Any, *biases: Tensor | None) -> None:
    """Keeps the biases of a call as `ctx.biases`, and how often they had been written to."""
    ctx.biases = biases
    ctx.versions = None if torch.compiler.is_compiling() else [*map(_version, biases)]


def unchanged(ctx: Any) -> Biases:
    """The biases with the values that they had in forward.

    Raises:
        RuntimeError: one has been written to since.
    """
    for bias, version in zip(ctx.biases, ctx.versions or (), strict=False):
        if _version(bias) != version:
            assert bias is not None
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a bias {list(bias.shape)} is at version {bias._version}; "
                f"expected version {version} instead"
            )
    biases: Biases = ctx.biases
    return biases
