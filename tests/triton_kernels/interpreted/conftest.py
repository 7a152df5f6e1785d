"""What the interpreted tests share."""

from __future__ import annotations

import pytest

from effnet_fast.triton_kernels import folds


@pytest.fixture
def two_parts_a_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Folds whose programs take two parts each, so that small cases need several levels.

    Returns:
        Filled as they run: the parts of each fold.
    """
    original, seen = folds._runs, []

    def runs(parts: int) -> tuple[int, int]:
        seen.append(parts)
        return original(parts)

    monkeypatch.setattr(folds, "ONE_RUN", 2)
    monkeypatch.setattr(folds, "RUN", 2)
    monkeypatch.setattr(folds, "_runs", runs)
    return seen
