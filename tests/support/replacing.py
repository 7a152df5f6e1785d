"""A small network, and functions and methods that are wrapped while it is called."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, nn

from effnet_fast.models import EfficientNet
from networks import MINI, calibrated_state, random_images

X = random_images(2, 32)


def network(kind: Any = EfficientNet, padding: str = "symmetric", **options: Any) -> Any:
    model = kind(replace(MINI, name="m", padding=padding), **options)
    model.load_state_dict(calibrated_state(MINI))
    return model.eval()


def replace_method(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[object]:
    """Wraps it; the calls of the wrapper."""
    calls: list[object] = []
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0] if args else None)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def count(model: nn.Module, x: Tensor, calls: list[object]) -> int:
    calls.clear()
    model(x)
    return len(calls)
