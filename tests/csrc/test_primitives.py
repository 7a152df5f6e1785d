"""What kernels are written in: the device's side and its twins are held to the same values."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

import compiling
import simt

SOURCE = compiling.ROOT / "tests/csrc/primitives.cu"


def assert_passes(program: Path) -> None:
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("0 of ")


@pytest.mark.slow
def test_twins(tmp_path: Path) -> None:
    simt.require()
    assert_passes(simt.compile_program(tmp_path, [SOURCE, *simt.RUNTIME], *simt.SANITIZED))


@pytest.mark.gpu
def test_intrinsics(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    flags = compiling.setup_module().NVCC_FLAGS
    program = tmp_path / "primitives"
    command = [
        "nvcc",
        *flags,
        "-arch=native",
        f"-I{compiling.ROOT / 'csrc'}",
        SOURCE,
        "-o",
        program,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_passes(program)
