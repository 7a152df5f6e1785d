"""What an autograd Function saves for backward: all that is there, but no biases.

Tools that walk a graph, as torchviz, take every saved tensor for one: None is never saved.

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


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Saves tensors for backward, and which of them are None."""
    ctx.is_saved = [tensor is not None for tensor in tensors]
    ctx.save_for_backward(*(tensor for tensor in tensors if tensor is not None))


def unpack(ctx: Any) -> tuple[Any, ...]:
    """What `save` was given; to be called once, since checkpoints refuse a second time."""
    tensors = iter(ctx.saved_tensors)
    return tuple([next(tensors) if is_saved else None for is_saved in ctx.is_saved])


def save_block(ctx: Any, saved: Biases, given: Biases, is_bias: Sequence[bool]) -> None:
    """Saves `saved` and `given` for backward, but the biases among these, which it keeps instead.

    Either has None where the other has a tensor.
    """
    pairs = [*zip(given, is_bias, strict=True)]
    save(ctx, *saved, *(None if b else t for t, b in pairs))
    keep(ctx, *(t if b else None for t, b in pairs))


def unpack_block(ctx: Any, count: int, biases: Biases) -> tuple[Any, Any]:
    """`saved`, of that count, and `given` of `save_block` again, from the kept biases."""
    tensors = unpack(ctx)
    pairs = zip(tensors[count:], biases, strict=True)
    return tensors[:count], tuple(tensor if bias is None else bias for tensor, bias in pairs)


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
