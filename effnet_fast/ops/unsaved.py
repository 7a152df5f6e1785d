"""Inputs of an autograd Function that its backward does not read: biases.

PyTorch saves no bias for backward, so that a bias may change in between, as by an optimizer that
steps before another graph's backward. A gradient that is differentiated again, or one of a batch,
is computed from all inputs once more; a bias that has changed by then raises PyTorch's error.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def save(ctx: Any, saved: Biases, given: Biases, is_bias: Sequence[bool]) -> None:
    """Saves `saved` and `given` for backward, but the biases among these, which it keeps instead.

    Either has None where the other has a tensor.
    """
    pairs = [*zip(given, is_bias, strict=True)]
    ctx.save_for_backward(*saved, *(None if b else t for t, b in pairs))
    keep(ctx, *(t if b else None for t, b in pairs))


def joined(unpacked: Sequence[Tensor | None], biases: Biases) -> Biases:
    """`given` of `save` again, from its part of the saved tensors and from the kept biases."""
    pairs = zip(unpacked, biases, strict=True)
    return tuple(tensor if bias is None else bias for tensor, bias in pairs)


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
