"""Compiles csrc/'s kernels and the test driver with the flags of setup.py, without torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
JOBS = 2
CXX = os.environ.get("CXX", "g++").split()


def setup_module() -> ModuleType:
    """setup.py as a module; importing it builds nothing."""
    spec = importlib.util.spec_from_file_location("effnet_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def require_compiler() -> None:
    """Skips the test where there is no C++ compiler."""
    if shutil.which(CXX[0]) is None:
        pytest.skip(f"no C++ compiler: {CXX[0]} is not on PATH")


def compile_object(source: Path, out: Path, *flags: str) -> Path:
    """Compiles one file.

    Raises:
        AssertionError: the compiler failed; the text is what it said.
    """
    command = [*CXX, *flags, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def compile_kernels(folder: Path, flags_of: Mapping[str, Sequence[str]]) -> dict[str, list[Path]]:
    """Compiles csrc/cpu/ for several instruction sets.

    Args:
        folder: where the objects go.
        flags_of: flags added to setup.py's own for each instruction set, as "-O1"; sets that
            setup.py does not compile for this machine are left out.

    Returns:
        The objects of each instruction set.
    """
    setup = setup_module()
    with ThreadPoolExecutor(JOBS) as pool:
        jobs = {
            isa: [
                pool.submit(
                    compile_object,
                    source,
                    folder / f"{name.replace('/', '.')}.{isa}.o",
                    *setup.CXX_FLAGS,
                    *setup.ISAS[isa],
                    f"-DEFFNET_ISA={isa}",
                    *flags,
                )
                for name, source in setup.cpu_sources().items()
            ]
            for isa, flags in flags_of.items()
            if isa in setup.ISAS
        }
        return {isa: [job.result() for job in of_isa] for isa, of_isa in jobs.items()}


def built_kernels(isas: Sequence[str]) -> dict[str, list[Path]] | None:
    """The objects that an editable install left, or None where one is missing or out of date."""
    folder = ROOT / "build/editable"
    sources = [ROOT / "setup.py", *(p for p in (ROOT / "csrc").rglob("*.[ch]*"))]
    newest = max(path.stat().st_mtime for path in sources)
    names = setup_module().cpu_sources()
    objects = {isa: [folder / f"{name}.{isa}.o" for name in names] for isa in isas}
    for path in (path for of_isa in objects.values() for path in of_isa):
        if not path.is_file() or path.stat().st_mtime < newest:
            return None
    return objects


def link_driver(folder: Path, objects: dict[str, list[Path]], *flags: str) -> Path:
    """Links tests/csrc/driver.cpp with the kernels of these instruction sets."""
    isas = " ".join(f"ISA({isa})" for isa in objects)
    source = ROOT / "tests/csrc/driver.cpp"
    driver = compile_object(
        source,
        folder / "driver.o",
        "-std=c++20",
        "-Wall",
        "-Wextra",
        *flags,
        f"-DDRIVER_ISAS={isas}",
    )
    out = folder / "driver"
    kernels = [str(path) for of_isa in objects.values() for path in of_isa]
    command = [*CXX, "-fopenmp", *flags, str(driver), *kernels, "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out
