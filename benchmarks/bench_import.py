"""What importing costs, each time in a new process.

`pytest benchmarks/bench_import.py --benchmark-only`
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from benchmarks import targets
from benchmarks.contest import OURS, Contest, UnavailableError

STATEMENTS = {
    OURS: "import effnet_fast",
    f"{OURS}_models": "import effnet_fast.models",
    "torch": "import torch",
    "timm": "import timm.models",
}


def _contest() -> Contest:
    def builder(statement: str) -> Callable[[], Callable[[], object]]:
        command = [sys.executable, "-c", statement]

        def build() -> Callable[[], object]:
            if subprocess.run(command, capture_output=True).returncode:
                raise UnavailableError(f"{statement!r} fails here")
            return lambda: subprocess.run(command, check=True)

        return build

    return Contest(
        *("import", targets.titled("import process"), "inference", "fp32", "cpu", 0),
        build={name: builder(statement) for name, statement in STATEMENTS.items()},
        check=lambda: None,
        yardsticks=frozenset(("torch",)),
        measure_memory=False,
    )


@pytest.mark.parametrize("contestant", STATEMENTS)
def test_import(enter, contestant: str) -> None:
    enter(contestant, _contest)
