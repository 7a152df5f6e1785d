"""What the tests of the benchmarks share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of pytest that a test starts are no workers of the run that the test is in."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
