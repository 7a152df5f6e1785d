"""What the tests of csrc/ compile, once for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

import native


@pytest.fixture(scope="session")
def old_cpu_objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The kernels for plain x86-64 and AVX2, lightly optimised: that compiles in half the time."""
    native.require_compiler()
    folder = tmp_path_factory.mktemp("old_cpu")
    return native.compile_kernels(folder, ["generic", "avx2"], "-O1")


@pytest.fixture(scope="session")
def old_cpu_driver(
    old_cpu_objects: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The driver with the kernels of both in one program, as the extension has them."""
    return native.link_driver(tmp_path_factory.mktemp("driver"), old_cpu_objects, "-O1", "-static")
