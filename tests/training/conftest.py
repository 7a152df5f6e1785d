"""A folder of images for the runs of this folder's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from training_runs import make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATA with 18 training and 6 validation images of three classes."""
    return make_data(tmp_path_factory.mktemp("images") / "colours")
