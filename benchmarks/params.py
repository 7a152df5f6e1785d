"""Parameters that several suites share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

DTYPES = ("fp32", pytest.param("bf16", marks=pytest.mark.full))


def require(device: str) -> None:
    """Skips a test for a device that this machine lacks: the mark gpu selects tests alone."""
    if device == "cuda" and not torch.cuda.is_available():
        # A timing on another device would stand for nothing.
        pytest.skip("there is no CUDA device")


def full_unless(names: Iterable[str], cases: Iterable[Any], key: str = "name") -> list[Any]:
    """Distinct cases as parameters; all but those of these names are left to --full.

    Args:
        names: the names that every run holds.
        cases: what the parameters are of.
        key: the attribute that is a case's name.

    Raises:
        ValueError: there is no case of such a name.
    """
    kept, distinct = set(names), dict.fromkeys(cases)
    if unknown := kept - {getattr(case, key) for case in distinct}:
        raise ValueError(f"no case is named {', '.join(sorted(unknown))}")
    return [
        pytest.param(case, id=name, marks=[] if name in kept else [pytest.mark.full])
        for case in distinct
        for name in [getattr(case, key)]
    ]
