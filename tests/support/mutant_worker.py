"""Runs tests in forks of a process that has imported PyTorch already, which saves most of a run.

Reads one JSON object a line: words for pytest, a file for its output, a limit in seconds. Answers
with the exit status, None where the limit was passed, a negative number for a signal.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time

import hypothesis  # noqa: F401
import numpy  # noqa: F401
import pytest
import torch  # noqa: F401

import torchvision_cpu  # noqa: F401  (before any import of torchvision)


def run(words: list[str], output: str) -> None:
    """Of the forked process: runs pytest, and ends."""
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    status = 3
    try:
        status = int(pytest.main(words))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child: int, limit_s: float) -> int | None:
    """The child's exit status; kills it and what it started after the limit."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    importlib.import_module("torchvision")
    sys.path[0] = os.getcwd()  # as `python -m pytest` has it
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run(request["words"], request["output"])
        print(json.dumps(wait(child, request["limit_s"])), flush=True)
