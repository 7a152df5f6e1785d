"""The kernels of 64-bit Arm: their results, under an emulator elsewhere, and their instructions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import aarch64
import compiling
import simt
from drivers import assert_passes, assert_within_bounds, compile_silu_driver, run_driver

pytestmark = pytest.mark.exhaustive
# Lightly optimised, which compiles several times faster; the second flag brings in FMA.
FLAGS = ("-O1", "-fexpensive-optimizations")
# Tiles that products spend their time in: the header, the tile, and how many
# multiplications by a lane its loop over four words of K has.
TILES = {
    "product": ("network/product", "product_tile<MultiplyFloat, 6, 1, false>", 4 * 6 * 4),
    "fetching": ("network/product", "product_tile<MultiplyFloat, 6, 1, true>", 4 * 6 * 4),
    "dense": ("network/dense_tile", "dense_tile<MultiplyFloat, 2, 6, 1>", 4 * 6 * 4),
    "panel": ("training/panel_product", "panel_tile<8, 2>", 4 * 8 * 2),
}
ARGUMENTS = {
    "product_tile": "const TileOperands&",
    "dense_tile": "const DenseOperands&",
    "panel_tile": "float*, const float*, int64_t, const float*, int64_t, bool",
}
INSTANCE = """
#include "cpu/{header}.h"
namespace effnet {{
namespace neon {{
template void {tile}({arguments});
}}
}}
"""
LABEL = re.compile(r"^(\.L\w+):")
BRANCH = re.compile(r"^\tb(?:\.\w+|\s|\.?\w+\s).*?(\.L\w+)$|^\tc?t?bn?z\s.*?(\.L\w+)$")
BY_LANE = re.compile(r"^\tfmla\s.*\.s\[\d\]$")
ON_STACK = re.compile(r"^\t(?:ldr|str|ldp|stp|ldur|stur)\s+q.*\[sp")


@pytest.fixture(scope="session")
def tools() -> aarch64.Tools:
    return aarch64.require()


@pytest.fixture(scope="session")
def driver(tools: aarch64.Tools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def build(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        isas = compiling.setup_module().ARM_ISAS
        objects = compiling.compile_kernels(folder, dict.fromkeys(isas, FLAGS), isas, tools.cxx)
        return compiling.link_driver(folder, objects, "-O1", "-static", cxx=tools.cxx)

    return simt.once(tmp_path_factory, "neon_driver", build)


@pytest.mark.parametrize("isa", ["generic", "neon"])
def test_kernels(driver: Path, tools: aarch64.Tools, isa: str) -> None:
    assert_passes(run_driver(driver, isa, *tools.run), isa)


def test_silu_on_a_grid(tools: aarch64.Tools, tmp_path: Path) -> None:
    isas = compiling.setup_module().ARM_ISAS
    driver = compile_silu_driver(tmp_path, isas, "-static", cxx=tools.cxx)
    assert_within_bounds(driver, "grid", before=tools.run)


def loops(assembly: str, function: str) -> list[list[str]]:
    """The lines of every innermost loop of the functions whose mangled name has this part."""
    found: list[list[str]] = []
    for body in re.findall(rf"^\w*{function}\w*:\n(.*?)^\t\.size", assembly, re.DOTALL | re.M):
        lines = body.splitlines()
        places = {match[1]: i for i, line in enumerate(lines) if (match := LABEL.match(line))}
        for end, line in enumerate(lines):
            match = BRANCH.match(line)
            begin = places.get(match[1] or match[2], end) if match else end
            inner = lines[begin:end]
            if begin < end and not any(BRANCH.match(other) for other in inner):
                found.append(inner)
    return found


@pytest.mark.parametrize(("header", "tile", "by_lane"), TILES.values(), ids=list(TILES))
def test_tiles_multiply_by_lane(
    tools: aarch64.Tools, tmp_path: Path, header: str, tile: str, by_lane: int
) -> None:
    """As the build compiles them: every product is formed by lane, and no sum is on the stack."""
    setup, name = compiling.setup_module(), tile.partition("<")[0]
    source = tmp_path / "tile.cpp"
    source.write_text(INSTANCE.format(header=header, tile=tile, arguments=ARGUMENTS[name]))
    flags = (*setup.CXX_FLAGS, *setup.ARM_ISAS["neon"], "-DEFFNET_ISA=neon", "-S")
    assembly = compiling.compile_object(source, tmp_path / "tile.s", *flags, cxx=tools.cxx)
    found = loops(assembly.read_text(), name)
    hot = [loop for loop in found if sum(bool(BY_LANE.match(x)) for x in loop) == by_lane]
    assert len(hot) == 1
    assert [line for line in hot[0] if ON_STACK.match(line)] == []
    assert sum("\tfmla\t" in line for line in hot[0]) == by_lane


def test_loops_are_found() -> None:
    text = (
        "_Z4tilev:\n.L2:\n\tfmla\tv0.4s, v1.4s, v2.s[3]\n\tldr\tq0, [sp, 16]\n\tbne\t.L2\n\t.size"
    )
    (loop,) = loops(text, "tile")
    assert [bool(BY_LANE.match(line)) for line in loop] == [False, True, False]
    assert [bool(ON_STACK.match(line)) for line in loop] == [False, False, True]
