"""What the tests of csrc/ compile, once for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

import compiling

# Lightly optimised, which compiles several times faster; the second flag of AVX2 brings in FMA.
OLD_CPU_FLAGS = {"avx2": ["-O1", "-fexpensive-optimizations"], "generic": ["-Og"]}


@pytest.fixture(scope="session")
def old_cpu_objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The kernels for AVX2 and for plain x86-64: those of an editable install where it is fresh."""
    compiling.require_compiler()
    if built := compiling.built_kernels(list(OLD_CPU_FLAGS)):
        return built
    return compiling.compile_kernels(tmp_path_factory.mktemp("old_cpu"), OLD_CPU_FLAGS)


@pytest.fixture(scope="session")
def old_cpu_driver(
    old_cpu_objects: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The driver with the kernels of both in one program, as the extension has them."""
    return compiling.link_driver(
        tmp_path_factory.mktemp("driver"), old_cpu_objects, "-O1", "-static"
    )
