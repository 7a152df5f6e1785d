"""Compiles csrc/'s kernels and the test driver with the flags of setup.py, without torch."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
JOBS = 2
CPU = ROOT / "csrc/cpu"
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


def compile_object(source: Path, out: Path, *flags: str, cxx: Sequence[str] = CXX) -> Path:
    """Compiles one file.

    Raises:
        AssertionError: the compiler failed; the text is what it said.
    """
    command = [*cxx, *flags, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def compile_kernels(
    folder: Path,
    flags_of: Mapping[str, Sequence[str]],
    isas: Mapping[str, Sequence[str]] | None = None,
    cxx: Sequence[str] = CXX,
) -> dict[str, list[Path]]:
    """Compiles csrc/cpu/ for several instruction sets.

    Args:
        folder: where the objects go.
        flags_of: flags added to setup.py's own for each instruction set, as "-O1"; sets that
            setup.py does not compile for this machine are left out.
        isas: the instruction sets of another machine with their flags, as setup.py has them.
        cxx: words of the compiler's command.

    Returns:
        The objects of each instruction set.
    """
    setup = setup_module()
    isas = setup.ISAS if isas is None else isas
    with ThreadPoolExecutor(JOBS) as pool:
        jobs = {
            isa: [
                pool.submit(
                    compile_object,
                    source,
                    folder / f"{name.replace('/', '.')}.{isa}.o",
                    *setup.CXX_FLAGS,
                    *isas[isa],
                    f"-DEFFNET_ISA={isa}",
                    *flags,
                    cxx=cxx,
                )
                for name, source in setup.cpu_sources().items()
            ]
            for isa, flags in flags_of.items()
            if isa in isas
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


def link_driver(
    folder: Path, objects: dict[str, list[Path]], *flags: str, cxx: Sequence[str] = CXX
) -> Path:
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
        cxx=cxx,
    )
    kernels = [path for of_isa in objects.values() for path in of_isa]
    return link(folder / "driver", [driver, *kernels], "-fopenmp", *flags, cxx=cxx)


def link(out: Path, objects: Sequence[Path], *flags: str, cxx: Sequence[str] = CXX) -> Path:
    """Links a program."""
    command = [*cxx, *flags, *map(str, objects), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def library(name: str) -> str:
    """The path of one of the compiler's own libraries."""
    command = [*CXX, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


SANITIZER = ("-O0", "-g1", "-fsanitize=address", "-fno-omit-frame-pointer")


def build_sanitized(folder: Path) -> None:
    """A copy of the package in a folder, its extension under AddressSanitizer, without CUDA.

    Python files are links, so that the copy runs what is here.
    """
    setup, objects = setup_module(), folder / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    kernels = compile_kernels(objects, dict.fromkeys(setup.ISAS, SANITIZER))
    flags = [*setup.CXX_FLAGS, *SANITIZER]
    flags += [f"-DEFFNET_HAS_{isa.upper()}=1" for isa in setup.ISAS]
    flags += [word for words in setup.binding_includes() for word in shlex.split(words)]
    sources = [p for p in sorted((ROOT / "csrc/bindings").glob("*.cpp")) if p.stem != "cuda"]
    with ThreadPoolExecutor(JOBS) as pool:
        jobs = [pool.submit(compile_object, p, objects / f"{p.stem}.o", *flags) for p in sources]
        linked = [job.result() for job in jobs]
    package = folder / "effnet_fast"
    package.mkdir(exist_ok=True)
    for path in (*(ROOT / "effnet_fast").iterdir(), ROOT / "triton_kernels"):
        link = package / path.name
        if not path.name.startswith(("_C", "__pycache__")) and not link.exists():
            link.symlink_to(path)
    linked += [path for of_isa in kernels.values() for path in of_isa]
    out = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [*CXX, "-shared", "-fopenmp", *SANITIZER, *map(str, linked), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
