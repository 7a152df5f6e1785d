"""Blocks over packed weights on the CUDA kernels, of every kind that these have."""

from __future__ import annotations

from typing import Any

import pytest

from cases import MBCONV_CASES, find
from effnet_fast.ops.cuda import dwconv_bn_silu
from mbconv_blocks import block_call
from packed_blocks import FUSED, KINDS, LITE, check_packed, check_packed_fused, packed_block
from parity import BF16, FP16, FP32, NEEDS_SIMT, Dtypes, runs


@runs((FP32, BF16, FP16), ("simt",))
@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "-".join(map(str, kinds.values())))
def test_matches_reference(kinds: dict[str, Any], dtypes: Dtypes, backend: str) -> None:
    for name in ("c_odd_stride_2", "no_expansion_residual"):
        check_packed(block_call(find(MBCONV_CASES, name), dtypes, False, **kinds), backend)


@runs((FP32, BF16, FP16), ("simt",))
@pytest.mark.parametrize("name", FUSED)
def test_fused_blocks(name: str, dtypes: Dtypes, backend: str) -> None:
    check_packed_fused(name, dtypes.x, backend)


@NEEDS_SIMT
def test_no_mean_is_formed_that_nothing_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block without squeeze-and-excite has no memory for sums."""
    monkeypatch.delattr(dwconv_bn_silu, "scratch")
    call = block_call(find(MBCONV_CASES, "w_gt_tile_k5"), FP32, False, **LITE)
    y = packed_block(call, "simt")(call.x)
    assert y.isfinite().all()
