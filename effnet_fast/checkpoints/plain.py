"""Which tensors can be a network's weights: plain ones, whose memory holds their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from effnet_fast.checkpoints.parameter_names import first_of


def problem(value: Any) -> str | None:
    """Why a value cannot be copied as numbers, element by element; None where it can."""
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}, not a tensor"
    if is_lazy(value):
        return "not initialised"
    if value.is_nested:
        return "a nested tensor"
    if value.layout is not torch.strided:
        return f"a tensor of layout {value.layout}, not a dense one"
    if value.is_quantized:
        return "a quantized tensor"
    if value.is_meta:
        return "on the meta device, without values"
    last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    end = value.storage_offset() + last + 1 if value.numel() else 0
    if value.untyped_storage().nbytes() < end * value.element_size():
        return "without its memory, which has been freed"
    return None


def problems(state: Mapping[Any, Any]) -> list[str]:
    """The entries that are no plain tensors, each with its problem."""
    found = ((key, problem(value)) for key, value in state.items())
    return [f"{key} is {text}" for key, text in found if text is not None]


def first_problems(state: Mapping[Any, Any]) -> str:
    """The same as text, the first few of them; empty where all are plain."""
    return first_of(problems(state))


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may lie at one place, as those of an expanded tensor do."""
    reach = 1  # elements from one step of this dimension to the last of the inner ones
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def memory_of(tensor: Tensor) -> int:
    """What two tensors that share memory have in common; 0 for those without elements."""
    return tensor.untyped_storage().data_ptr() if tensor.numel() else 0
