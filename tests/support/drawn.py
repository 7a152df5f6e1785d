"""How many inputs hypothesis draws: few, always the same, or hundreds, others in every run."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

_ALWAYS = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}
FEW = settings(max_examples=5, derandomize=True, **_ALWAYS)
MANY = settings(max_examples=200, print_blob=True, **_ALWAYS)
# For a test that decorates a function of its own: `@draws @given(...) def examine(...)`.
DRAWS = pytest.mark.parametrize(
    "draws",
    [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.exhaustive)],
)
