"""What the launchers share, and the constants that they start kernels with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import (
    PRODUCTS,
    Build,
    compile_build,
    instructions,
    record,
    resources,
    run_head,
    run_stem,
    run_training,
)
from effnet_fast.triton_kernels import launching
from shapes import shapes_of


@pytest.fixture
def allow() -> Iterator[Callable[[str], None]]:
    """Sets the precision that PyTorch allows in fp32 products; afterwards it is restored."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    yield partial(setattr, settings, "fp32_precision")
    settings.fp32_precision = before


def precisions(builds: dict[Build, object]) -> dict[str, set[str]]:
    """PRECISION of each product among the builds."""
    found: dict[str, set[str]] = {}
    for build in builds:
        if build.name in PRODUCTS:
            found.setdefault(build.name, set()).add(dict(build.constants)["PRECISION"])
    return found


@pytest.mark.parametrize(
    ("dtype", "setting", "expected"),
    [
        (torch.float32, "ieee", "ieee"),
        (torch.float32, "tf32", "tf32"),
        (torch.float32, "none", "ieee"),
        (torch.bfloat16, "tf32", "ieee"),
    ],
    ids=str,
)
def test_products_follow_torchs_setting(
    dtype: torch.dtype, setting: str, expected: str, allow: Callable[[str], None]
) -> None:
    allow(setting)
    block = shapes_of("b0").blocks[1]
    head = record(partial(run_head, "b0", 8, dtype))
    stem = record(partial(run_stem, "b0", 8, dtype, True))
    found = precisions(record(partial(run_training, block, 8, dtype)) | head | stem)
    assert found == {name: {expected} for name in PRODUCTS}


def test_amd_computes_in_ieee(
    allow: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    allow("tf32")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert launching.dot_precision(torch.float32) == "ieee"


@pytest.mark.slow
def test_tf32_compiles_to_tensor_cores(allow: Callable[[str], None]) -> None:
    allow("tf32")
    builds = record(partial(run_training, shapes_of("b0").blocks[1], 8, torch.float32))
    build, kernel = next((b, k) for b, k in builds.items() if b.name == "pointwise_fwd_kernel")
    compiled = compile_build(kernel, build, 90)
    assert any("TF32" in name for name in instructions(compiled))
    assert resources(compiled).spilled == 0


def test_strides_count_where_a_size_exceeds_one() -> None:
    """A row of one pixel, cut out of wider rows by an odd stride, still loads vectors."""
    x = torch.empty(3000).as_strided((2, 8, 5, 1), (1000, 1, 40, 37))
    assert launching.pixel_strides(x) == (1000, 40, 0)
    assert launching.units(8, *launching.pixel_strides(x)) == (8, 1, 125, 5, 0)
    assert launching.units(8, 1000, 37) == (1, 8, 1000, 37)
