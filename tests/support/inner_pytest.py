"""For tests that start pytest themselves."""

from __future__ import annotations

import os


def environment() -> dict[str, str]:
    """The process's variables without those of pytest.

    PYTEST_ADDOPTS may name plugins and files that only the outer run has, and a worker of
    pytest-xdist hands on who it is.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
