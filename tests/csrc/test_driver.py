"""The kernels against naive loops, without torch: here, under the sanitizers, on emulated CPUs.

An emulated Nehalem has neither AVX nor FMA, an emulated Haswell no AVX-512: a path that uses what
the CPU lacks dies of an illegal instruction, as it would on a machine of that age.
"""

from __future__ import annotations

import platform
import shutil
import signal
from pathlib import Path

import pytest

import compiling
from drivers import assert_passes, run_driver
from effnet_fast.backends import native

RUNS_ON = {"Nehalem": "generic", "Haswell": "avx2"}  # the best of each
AMX_IS_IN = "avx512_bf16"  # the objects whose functions use the tile unit where told to
BESIDE_PYTHON = (
    compiling.ROOT / ".venv/qemu/usr/bin/qemu-x86_64-static"
)  # where `make qemu` puts it

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason=f"x86-64 alone, not {platform.machine()}"
)


@pytest.fixture(scope="session")
def qemu() -> str:
    for name in ("qemu-x86_64-static", "qemu-x86_64", str(BESIDE_PYTHON)):
        if found := shutil.which(name):
            return found
    pytest.skip("qemu-x86_64 is not on PATH; `make qemu` fetches it")


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_here(old_cpu_driver: Path, isa: str) -> None:
    if reason := native.load().isa_unavailable_reason(isa):
        pytest.skip(reason)
    assert_passes(run_driver(old_cpu_driver, isa), isa)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("cpu", "isa"), RUNS_ON.items())
def test_on_an_emulated_cpu(old_cpu_driver: Path, qemu: str, cpu: str, isa: str) -> None:
    assert_passes(run_driver(old_cpu_driver, isa, qemu, "-cpu", cpu), isa)


@pytest.mark.exhaustive
def test_the_emulated_cpu_does_lack_instructions(old_cpu_driver: Path, qemu: str) -> None:
    done = run_driver(old_cpu_driver, "avx2", qemu, "-cpu", "Nehalem")
    assert done.returncode in (-signal.SIGILL, 128 + signal.SIGILL)
    assert "Illegal instruction" in done.stderr


@pytest.mark.slow
def test_the_driver_can_fail(old_cpu_driver: Path) -> None:
    done = run_driver(old_cpu_driver, "generic", fp32=1e-9)
    assert done.returncode == 1
    assert "dwconv 2x3x5x7 k3 s1 fp32 on 1: " in done.stdout
    assert run_driver(old_cpu_driver, "sse9").returncode == 2


@pytest.mark.exhaustive
def test_under_sanitizers(tmp_path: Path) -> None:
    """The best instruction set that runs here, every heap block of exactly its size."""
    compiling.require_compiler()
    isa = native.load().best_isa()
    compiled = AMX_IS_IN if isa == "amx" else isa
    flags = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    objects = compiling.compile_kernels(tmp_path, {compiled: flags})
    driver = compiling.link_driver(tmp_path, objects, *flags)
    for name in dict.fromkeys((compiled, isa)):
        assert_passes(run_driver(driver, name), name)
