"""Every kernel compiled for GPUs that are not there, within budgets of registers and memory.

`budgets.json` holds, by compute capability and kernel, the most registers per thread and bytes of
shared memory of any build; `python tests/support/ahead_of_time.py` writes it anew. A spill
has no budget.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import ahead_of_time
from ahead_of_time import (
    BATCHES,
    LITE,
    MOBILE,
    PRODUCTS,
    TARGETS,
    Build,
    Kinds,
    builds,
    builds_of,
    compile_build,
    instructions,
    record,
    resources,
    run_deployed,
    run_inference,
    run_training,
)
from effnet_fast.triton_kernels import launching
from shapes import shapes_of

BUDGETS = json.loads(Path(ahead_of_time.BUDGETS).read_text())
FUSED = "expand_dwconv_fwd_kernel"  # not for fp32
WGMMA_ROWS = 64  # of the accumulator: fewer take the instructions of sm_80
ROWS = {"pointwise_bwd_weight_kernel": "BN", "stem_bwd_weight_kernel": "BN"}  # others: BM


def _jobs() -> Iterator[Any]:
    """For sm_90 in bf16 a few of B0's builds in `make test`; everything in `make test-all`."""
    for (capability, dtype), kernels in TARGETS.items():
        for kernel in sorted(BUDGETS[f"{capability}"]):
            half = dtype != torch.float32
            if (kernels is None or kernel in kernels) and (half or kernel != FUSED):
                name = f"sm_{capability}-{str(dtype).removeprefix('torch.')}-{kernel}"
                if (capability, dtype) == (90, torch.bfloat16):
                    yield pytest.param(
                        *(capability, dtype, kernel, ("b0",)),
                        id=f"{name}-b0",
                        marks=pytest.mark.slow,
                    )
                yield pytest.param(
                    *(capability, dtype, kernel, tuple(BATCHES)),
                    id=name,
                    marks=pytest.mark.exhaustive,
                )


@pytest.mark.slow
def test_every_kernel_has_a_budget() -> None:
    """The launchers of B0, B4 and B7 start exactly the kernels of the table."""
    launched = {build.name for build in builds(torch.bfloat16)}
    for capability in ("80", "90", "100"):
        assert set(BUDGETS[capability]) == launched


@pytest.mark.parametrize(("capability", "dtype", "kernel", "variants"), _jobs())
def test_within_budget(
    capability: int, dtype: torch.dtype, kernel: str, variants: tuple[str, ...]
) -> None:
    found = (builds_of(variant, dtype).items() for variant in variants)
    own = {build: k for items in found for build, k in items if build.name == kernel}
    assert own
    if variants == ("b0",):  # three of them, evenly spread
        own = dict(list(own.items())[:: -(-len(own) // 3)])
    registers, shared = BUDGETS[f"{capability}"][kernel]
    for build, function in own.items():
        compiled = compile_build(function, build, capability)
        found = resources(compiled)
        assert found.spilled == 0, f"{build} spills {found.spilled} bytes on sm_{capability}"
        assert found.registers <= registers, f"{build}: {found.registers} registers"
        assert found.shared <= shared, f"{build}: {found.shared} bytes of shared memory"
        if capability == 90 and kernel in PRODUCTS and uses_tensor_cores(build):
            assert any(op.startswith("HGMMA") for op in instructions(compiled)), (
                f"{build}: no HGMMA"
            )
        if kernel == FUSED:
            ops = list(instructions(compiled))
            assert any(op.startswith("HMMA") for op in ops), f"{build}: no HMMA"
        if kernel.startswith("dwconv") and dict(build.constants)["VEC"] == launching.VEC:
            assert not single_loads(compiled), f"{build} loads single values of 16 bits"


@pytest.mark.slow
def test_deployed_blocks_within_budget() -> None:
    """Packed weights leave out BatchNorm's vectors: other builds of the same kernels, on sm_90."""
    launched: dict[Build, Any] = {}
    for block in list(dict.fromkeys(shapes_of("b0").blocks))[:2]:
        launched |= record(lambda block=block: run_deployed(block, 256, torch.bfloat16))
    assert {build.name for build in launched} >= {"pointwise_fwd_kernel", "dwconv_fwd_kernel"}
    for build, function in launched.items():
        found = resources(compile_build(function, build, 90))
        registers, shared = BUDGETS["90"][build.name]
        assert found.spilled == 0, f"{build} spills {found.spilled} bytes"
        assert found.registers <= registers, f"{build}: {found.registers} registers"
        assert found.shared <= shared, f"{build}: {found.shared} bytes of shared memory"


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [LITE, MOBILE], ids=["lite", "mobile"])
def test_clamps_within_budget(kinds: Kinds) -> None:
    """Without squeeze-and-excite, and with a hard gate: no more than SiLU's builds, on sm_90."""
    block = next(block for block in shapes_of("b0").blocks if block.expands)
    launched = record(lambda: run_training(block, 256, torch.bfloat16, kinds))
    launched |= record(lambda: run_inference(block, 256, torch.bfloat16, kinds))
    assert ("excite_kernel" in {build.name for build in launched}) == (kinds.gate is not None)
    for build, function in launched.items():
        found = resources(compile_build(function, build, 90))
        registers, shared = BUDGETS["90"][build.name]
        assert found.spilled == 0, f"{build} spills {found.spilled} bytes"
        assert found.registers <= registers, f"{build}: {found.registers} registers"
        assert found.shared <= shared, f"{build}: {found.shared} bytes of shared memory"


def uses_tensor_cores(build: Build) -> bool:
    constants, types = dict(build.constants), dict(build.signature)
    rows = constants[ROWS.get(build.name, "BM")]
    half = any(t in ("*fp16", "*bf16") for t in types.values())
    return half and rows >= WGMMA_ROWS


def single_loads(compiled: Any) -> int:
    """Loads from memory of one value of 16 bits, which are as many instructions as values."""
    return len(re.findall(r"\bld\.global[.\w]*\.b16\s*\{\s*%\w+\s*\}", compiled.asm["ptx"]))


@pytest.mark.slow
def test_single_loads_are_noticed() -> None:
    """Channel counts that 8 does not divide leave nothing known about where a pixel begins."""
    build, function = next(
        (b, k) for b, k in builds(torch.bfloat16).items() if b.name == "dwconv_bwd_weight_kernel"
    )
    unknown = build._replace(constants=tuple(sorted((dict(build.constants) | {"VEC": 1}).items())))
    assert single_loads(compile_build(function, unknown, 90)) > 0


@pytest.mark.slow
def test_a_spill_is_noticed() -> None:
    """Tiles far too large for the registers show as spilled bytes."""
    build, function = next(
        (b, k) for b, k in builds(torch.bfloat16).items() if b.name == "bn_act_bwd_kernel"
    )
    large = dict(build.constants) | {"BP": 64, "BC": 128}
    spilling = build._replace(constants=tuple(sorted(large.items())), options=(("num_warps", 1),))
    assert resources(compile_build(function, spilling, 90)).spilled > 0
