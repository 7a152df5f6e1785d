"""Fixtures of every test."""

from __future__ import annotations

import os
import random

import numpy
import pytest
import torch

import torchvision_cpu  # noqa: F401  (before any import of torchvision)

# Workers side by side would spin against each other's OpenMP threads: one thread each. The tests
# of threading set their own number.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds every generator before each test, whatever ran before it."""
    value = 0
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)
    return value
