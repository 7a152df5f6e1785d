"""Starts the tests of `interpreted/`, some files each in a process whose kernels Triton interprets.

The flag counts when a kernel is decorated, so it must be there before the first import.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import inner_pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "interpreted"
ROOT = FOLDER.parents[2]
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))
TIMEOUT_S = 3600  # of a process that hangs


def test_there_are_files() -> None:
    assert FILES


PROCESSES = 3


@pytest.mark.slow
@pytest.mark.parametrize("first", range(PROCESSES))
def test_some(first: int) -> None:
    """In few processes: the start of one takes as long as many of these tests."""
    run(FILES[first::PROCESSES], "not exhaustive")


@pytest.mark.exhaustive
@pytest.mark.parametrize("file", FILES)
def test_rest(file: str) -> None:
    run([file], "exhaustive")


def run(files: list[str], selected: str) -> None:
    """Every test of the files in this tier passes, and each file has at least one."""
    environment = inner_pytest.environment() | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider"]
    command += ["-m", selected]
    done = subprocess.run(
        [*command, *(str(FOLDER / file) for file in files)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^=+ \d+ passed", done.stdout, re.MULTILINE), done.stdout[-2000:]
    assert "skipped" not in done.stdout, done.stdout[-2000:]
    for file in files:
        assert re.search(rf"{file}::.* PASSED", done.stdout), done.stdout[-2000:]
