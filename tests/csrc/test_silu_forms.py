"""SiLU, its slope and the sigmoid of every instruction set, over all floats.

silu_driver.cpp says what is compared; it compiles the kernels' own headers with the build's flags.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import compiling
import simt
from effnet_fast.backends import native
from tolerances import SILU_ULP

BLOCKS = 1 << 20  # of 4,096 floats; the first half have no sign
HERE = compiling.ROOT / "tests/csrc"


def build(folder: Path) -> Path:
    """The driver with the forms of each instruction set that runs here."""
    folder.mkdir(parents=True, exist_ok=True)
    setup = compiling.setup_module()
    isas = [isa for isa in setup.ISAS if native.load().isa_unavailable_reason(isa) is None]
    objects = [
        compiling.compile_object(
            HERE / "silu_forms.cpp",
            folder / f"silu_forms.{isa}.o",
            *setup.CXX_FLAGS, *setup.ISAS[isa], f"-DEFFNET_ISA={isa}",
        )
        for isa in isas
    ]  # fmt: skip
    driver = compiling.compile_object(
        HERE / "silu_driver.cpp",
        folder / "silu_driver.o",
        *setup.CXX_FLAGS, "-march=native", f"-DDRIVER_ISAS={' '.join(f'ISA({n})' for n in isas)}",
    )  # fmt: skip
    return simt.link(folder / "silu_driver", [driver, *objects])


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiling.require_compiler()
    return simt.once(tmp_path_factory, "silu_driver", build)


def assert_within_bounds(driver: Path, *which: str) -> None:
    """Every form's largest error, in ulp, is within tests/support/tolerances.py."""
    command = [str(driver), *which]
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


@pytest.mark.slow
def test_a_grid(driver: Path) -> None:
    assert_within_bounds(driver, "grid")


@pytest.mark.exhaustive
@pytest.mark.parametrize("sign", [0, 1], ids=["positive", "negative"])
def test_all_floats(driver: Path, sign: int) -> None:
    first = sign * BLOCKS // 2
    assert_within_bounds(driver, str(first), str(first + BLOCKS // 2))
