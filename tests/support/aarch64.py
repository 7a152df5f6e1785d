"""A compiler for 64-bit Arm and what runs its programs, on such a machine and elsewhere.

Elsewhere both come from PATH, or from where `make qemu cross` unpacks them beside Python.
"""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

import compiling

BESIDE_PYTHON = compiling.ROOT / ".venv"
CROSS = BESIDE_PYTHON / "cross/usr"
EMULATOR = "qemu-aarch64"


@dataclass(frozen=True)
class Tools:
    """Words of commands.

    Args:
        cxx: the compiler's.
        run: what stands before a program, nothing on such a machine.
    """

    cxx: tuple[str, ...]
    run: tuple[str, ...]


def require() -> Tools:
    """Finds them, or skips the test and says what is missing."""
    if platform.machine() in ("aarch64", "arm64"):
        compiling.require_compiler()
        return Tools(tuple(compiling.CXX), ())
    places = (EMULATOR, f"{EMULATOR}-static", BESIDE_PYTHON / f"qemu/usr/bin/{EMULATOR}-static")
    emulator = next((found for place in places if (found := shutil.which(place))), None)
    if emulator is None:
        pytest.skip(f"{EMULATOR} is not on PATH; `make qemu` fetches it")
    return Tools(_cross_compiler(), (emulator,))


def _cross_compiler() -> tuple[str, ...]:
    name = "aarch64-linux-gnu-g++"
    if found := shutil.which(name):
        return (found,)
    unpacked: Path = CROSS / "bin" / name
    if not unpacked.is_file():
        pytest.skip(f"{name} is not on PATH; `make cross` fetches it")
    libraries = next(CROSS.glob("lib/*/libbfd-*.so"), CROSS).parent  # the assembler's own
    return ("env", f"LD_LIBRARY_PATH={libraries}", str(unpacked))
