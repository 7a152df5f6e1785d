"""No code of one instruction set can be taken for another's.

The linker keeps one copy of an inline function that several objects define. Were that copy the one
compiled for AVX-512, an older CPU would die in it: every such function must bear its set's name.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import compiling
from effnet_fast.backends import native

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason=f"x86-64 alone, not {platform.machine()}"
)
SHARED = """
#include "cpu/simd/vec.h"
namespace effnet {
__attribute__((noinline)) inline float shared(const float* p) { return p[0] * p[1]; }
namespace EFFNET_ISA {
float use(const float* p) { return shared(p); }
}
}
"""


def require(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not on PATH (Debian package: binutils)")


def namespace(isa: str) -> str:
    """The namespace effnet::<isa> as mangled names contain it."""
    return f"6effnet{len(isa)}{isa}"


def foreign_symbols(objects: list[Path], isa: str) -> list[str]:
    """Symbols that the linker may merge or export and that lie outside of the set's namespace."""
    require("nm")
    command = ["nm", "--defined-only", "--format=posix", *map(str, objects)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = [line.split()[:2] for line in lines if len(line.split()) >= 2]
    return [
        name
        for name, kind in symbols
        if (kind.isupper() or kind in "uvw")
        and namespace(isa) not in name
        and not name.startswith("DW.ref.")  # the address of a function of the C++ runtime
    ]


@pytest.mark.slow
def test_old_sets_define_nothing_in_common(old_cpu_objects: dict[str, list[Path]]) -> None:
    for isa, objects in old_cpu_objects.items():
        assert objects
        assert foreign_symbols(objects, isa) == []


@pytest.mark.exhaustive
def test_avx512_defines_nothing_in_common(tmp_path: Path) -> None:
    """Without optimisation, where every inline function stays one."""
    compiling.require_compiler()
    flags_of = {"avx512": ["-O0"], "avx512_bf16": ["-O0"]}
    for isa, objects in compiling.compile_kernels(tmp_path, flags_of).items():
        assert foreign_symbols(objects, isa) == []


@pytest.mark.slow
def test_a_shared_function_is_found(tmp_path: Path) -> None:
    compiling.require_compiler()
    source = tmp_path / "shared.cpp"
    source.write_text(SHARED)
    flags = (*compiling.setup_module().X86_ISAS["avx512"], "-std=c++20", "-DEFFNET_ISA=avx512")
    native_object = compiling.compile_object(source, tmp_path / "shared.o", *flags)
    assert foreign_symbols([native_object], "avx512") == ["_ZN6effnet6sharedEPKf"]


def instructions(library: Path) -> Iterator[tuple[str, str]]:
    """(function, instruction) for everything in the library."""
    require("objdump")
    command = ["objdump", "-d", "--no-show-raw-insn", str(library)]
    function = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.match(r"[0-9a-f]+ <(.*)>:$", line):
                function = match.group(1)
            elif "\t" in line:
                yield function, line.split("\t", 1)[1].strip()


@pytest.mark.slow
def test_the_extension_uses_vectors_only_where_it_may() -> None:
    """As linked: VEX-encoded code only in the namespaces of AVX2 and newer, zmm in AVX-512's."""
    library = Path(native.load().__file__)
    seen = {"vex": 0, "zmm": 0}
    for function, instruction in instructions(library):
        if "%zmm" in instruction:
            seen["zmm"] += 1
            assert "6effnet6avx512" in function or "6effnet11avx512_bf16" in function, function
        elif re.match(r"v[a-z]", instruction) and not instruction.startswith(("verr", "verw")):
            seen["vex"] += 1
            assert re.search("6effnet(4avx2|6avx512|11avx512_bf16)", function), function
    if "avx512" in native.load().isas():
        assert min(seen.values()) > 1000


def test_the_extension_exports_its_init_function_alone() -> None:
    require("nm")
    command = ["nm", "-D", "--defined-only", "-C", "--format=posix", native.load().__file__]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = {line.rsplit(" ", 3)[0] for line in lines}
    assert "PyInit__C" in names
    assert [name for name in names if "effnet" in name] == []
