"""SiLU, its slope and the sigmoid of every instruction set, over all floats.

silu_driver.cpp says what is compared; it compiles the kernels' own headers with the build's flags.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import compiling
import simt
from drivers import assert_within_bounds, compile_silu_driver
from effnet_fast.backends import native

BLOCKS = 1 << 20  # of 4,096 floats; the first half have no sign


def build(folder: Path) -> Path:
    """The driver with the forms of each instruction set that runs here."""
    folder.mkdir(parents=True, exist_ok=True)
    unavailable = native.load().isa_unavailable_reason
    isas = {n: flags for n, flags in compiling.setup_module().ISAS.items() if not unavailable(n)}
    return compile_silu_driver(folder, isas, "-march=native")


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiling.require_compiler()
    return simt.once(tmp_path_factory, "silu_driver", build)


@pytest.mark.slow
def test_a_grid(driver: Path) -> None:
    assert_within_bounds(driver, "grid")


@pytest.mark.exhaustive
@pytest.mark.parametrize("sign", [0, 1], ids=["positive", "negative"])
def test_all_floats(driver: Path, sign: int) -> None:
    first = sign * BLOCKS // 2
    assert_within_bounds(driver, str(first), str(first + BLOCKS // 2))
