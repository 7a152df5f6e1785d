"""Whole MBConv blocks, every one of B0 and B7.

`pytest benchmarks/bench_mbconv.py --benchmark-only`
"""

from __future__ import annotations

import pytest

from benchmarks import op_contests as ops
from benchmarks.contest import OURS
from benchmarks.params import DTYPES, full_unless
from cases import MBConvCase, mbconv_of

COMPILED = pytest.param(ops.COMPILED, marks=pytest.mark.full)
CASES = [*mbconv_of("b0", batch=1), *mbconv_of("b7", batch=1)]
SHOWN = (  # one of each kind: without expansion, and of each kernel and stride with it
    "b0_c32_16_112_k3_s1",
    "b0_c16_24_112_k3_s2",
    "b0_c80_80_14_k3_s1",
    "b0_c112_192_14_k5_s2",
    "b0_c112_112_14_k5_s1",
)


@pytest.mark.parametrize("contestant", [OURS, ops.STOCK, COMPILED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", full_unless(SHOWN, CASES))
def test_inference(enter, case: MBConvCase, dtype: str, device: str, contestant: str) -> None:
    enter(contestant, ops.mbconv, case, "inference", dtype, device)


@pytest.mark.parametrize("contestant", [OURS, ops.STOCK, COMPILED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", full_unless(SHOWN, CASES))
def test_training(enter, case: MBConvCase, dtype: str, device: str, contestant: str) -> None:
    enter(contestant, ops.mbconv, case, "training", dtype, device)
