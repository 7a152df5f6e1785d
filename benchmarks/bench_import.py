"""What importing costs beyond torch, each time in a new process.

`pytest benchmarks/bench_import.py --benchmark-only`
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from benchmarks.contest import OURS, Contest, UnavailableError

MODULES = {OURS: "effnet_fast", f"{OURS}_models": "effnet_fast.models", "timm": "timm.models"}
CONTESTANTS = (
    OURS,
    *(pytest.param(name, marks=pytest.mark.full) for name in MODULES if name != OURS),
)
TIMED = """
import time, torch
start = time.perf_counter()
import {}
print((time.perf_counter() - start) * 1e3)
"""


def _reported(function: Callable[[], object], seconds: float, at_least: int) -> list[float]:
    """What the processes say that they took, ms."""
    return [float(str(function())) for _ in range(at_least)]


def _contest() -> Contest:
    def builder(module: str) -> Callable[[], Callable[[], object]]:
        command = [sys.executable, "-c", TIMED.format(module)]

        def build() -> Callable[[], object]:
            if subprocess.run(command, capture_output=True).returncode:
                raise UnavailableError(f"import {module} fails here")
            return lambda: subprocess.run(command, check=True, capture_output=True).stdout.decode()

        return build

    return Contest(
        *("import", "beyond_torch", "inference", "fp32", "cpu", 0),
        build={name: builder(module) for name, module in MODULES.items()},
        check=lambda: None,
        measure_memory=False,
        rounds=2,
        clock=_reported,
    )


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_import(enter, contestant: str) -> None:
    enter(contestant, _contest)
