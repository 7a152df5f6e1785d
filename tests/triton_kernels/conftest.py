"""What a process can test: it interprets kernels or it compiles them, never both."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
# The folder `interpreted` runs in processes that test_interpreter.py starts.
collect_ignore_glob = ["test_*.py"] if INTERPRETS else ["interpreted/*"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small shapes wait for threads longer than they compute; afterwards the number is restored."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
