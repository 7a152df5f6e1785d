"""Fixtures of the op tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from effnet_fast.ops.cuda import dwconv_bn_silu as launcher
from effnet_fast.ops.cuda import tiles


@pytest.fixture
def table_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CUDA blocks as large as the table says, whether or not they fill a device."""
    monkeypatch.setattr(tiles, "BLOCKS", 1)
    launcher._plan.cache_clear()
    yield
    launcher._plan.cache_clear()
