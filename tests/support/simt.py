"""Compiles programs with the host run of the CUDA kernels (csrc/simt), without torch."""

from __future__ import annotations

import fcntl
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from compiling import CXX, JOBS, ROOT, link, require_compiler, setup_module

RUNTIME = sorted(p for p in (ROOT / "csrc/simt").glob("*.cpp") if p.stem != "module")
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
SANITIZERS = ("-fsanitize=address", "-fsanitize=undefined", "-fno-sanitize-recover=all")
# -O1: ten times faster than -O0 to run, and to compile hardly slower.
SANITIZED = ("-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZERS)


def require() -> None:
    """Skips the test where the host run cannot be compiled."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        pytest.skip(f"the host run is for x86-64 Linux, not {platform.machine()}")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH: its headers are needed")
    require_compiler()


def _compile(source: Path, out: Path, flags: Sequence[str]) -> Path:
    command = [
        "nvcc",
        "-x",
        "c++",
        "-ccbin",
        setup_module().compiler_of(" ".join(CXX)),
        "-std=c++20",
        "-DEFFNET_SIMT",
    ]
    command += [f"-I{ROOT / 'csrc'}", "-Xcompiler", ",".join(flags), "-c", str(source)]
    done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return out


def compile_objects(folder: Path, sources: Sequence[Path], *flags: str) -> list[Path]:
    """Compiles sources, each as C++ with setup.py's flags and these, to folder/NAME.o.

    Raises:
        AssertionError: the compiler failed or warned; the text is what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    all_flags = [*setup_module().SIMT_FLAGS, *flags]
    with ThreadPoolExecutor(JOBS) as pool:
        jobs = [
            pool.submit(_compile, source, folder / f"{source.name}.o", all_flags)
            for source in sources
        ]
        return [job.result() for job in jobs]


def compile_program(folder: Path, sources: Sequence[Path], *flags: str) -> Path:
    """`compile_objects` and `link`."""
    return link(folder / "program", compile_objects(folder, sources, *flags), *flags)


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Path]) -> Path:
    """What `make(folder)` returns, made by the first of pytest's workers that gets here.

    One that failed is tried again by the next, which then fails with the same message.
    """
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if root.name.startswith("popen-") else root) / name
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder.with_suffix(".done")
        if not done.is_file():
            done.write_text(str(make(folder)))
        return Path(done.read_text())
