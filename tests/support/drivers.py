"""Runs the programs that hold the CPU kernels to loops in double precision, without torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import compiling
from tolerances import DRIVER_BF16, DRIVER_FP32, SILU_ULP

HERE = compiling.ROOT / "tests/csrc"


def run_driver(
    driver: Path, isa: str, *before: str, fp32: float = DRIVER_FP32
) -> subprocess.CompletedProcess[str]:
    """Runs what `compiling.link_driver` made; `before`: words of the command before it."""
    command = [*before, str(driver), isa, repr(fp32), repr(DRIVER_BF16)]
    env = os.environ | {"OMP_WAIT_POLICY": "passive"}  # waiting threads take an emulator's time
    return subprocess.run(command, capture_output=True, text=True, timeout=3600, env=env)


def assert_passes(done: subprocess.CompletedProcess[str], isa: str) -> None:
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}{done.stderr}"
    assert done.stdout.startswith(f"{isa}: 0 of ")


def compile_silu_driver(
    folder: Path,
    isas: Mapping[str, Sequence[str]],
    *flags: str,
    cxx: Sequence[str] = compiling.CXX,
) -> Path:
    """The driver with the forms of these instruction sets, by their flags; `flags`: its own."""
    common = compiling.setup_module().CXX_FLAGS
    objects = [
        compiling.compile_object(
            HERE / "silu_forms.cpp",
            folder / f"silu_forms.{isa}.o",
            *(*common, *of_isa, f"-DEFFNET_ISA={isa}"),
            cxx=cxx,
        )
        for isa, of_isa in isas.items()
    ]
    driver = compiling.compile_object(
        HERE / "silu_driver.cpp",
        folder / "silu_driver.o",
        *(*common, *flags, f"-DDRIVER_ISAS={' '.join(f'ISA({isa})' for isa in isas)}"),
        cxx=cxx,
    )
    return compiling.link(folder / "silu_driver", [driver, *objects], *flags, cxx=cxx)


def assert_within_bounds(driver: Path, *which: str, before: Sequence[str] = ()) -> None:
    """Every form's largest error, in ulp, is within tests/support/tolerances.py.

    Args:
        driver: of `compile_silu_driver`.
        which: its arguments.
        before: words of the command before it, an emulator's.
    """
    command = [*before, str(driver), *which]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines
    wrong = [
        f"{form} of {x} on {isa} is {actual}, not {exact}: {error} ulp"
        for isa, form, error, x, actual, exact in lines
        if not float(error) <= SILU_ULP[isa][form]
    ]
    assert wrong == []
