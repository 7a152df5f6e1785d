"""Depthwise convolution + BN + SiLU, on every shape of B0 and B7.

`pytest benchmarks/bench_dwconv.py --benchmark-only`
"""

from __future__ import annotations

import pytest

from benchmarks import op_contests as ops
from benchmarks.contest import OURS
from benchmarks.params import DTYPES, full_unless
from cases import DwconvCase, dwconv_of

COMPILED = pytest.param(ops.COMPILED, marks=pytest.mark.full)
CASES = [*dwconv_of("b0", batch=1), *dwconv_of("b7", batch=1)]
SHOWN = ("b0_c240_28_k5_s1",)


@pytest.mark.parametrize("contestant", [OURS, ops.STOCK, COMPILED, ops.CONV])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", full_unless(SHOWN, CASES))
def test_inference(enter, case: DwconvCase, dtype: str, device: str, contestant: str) -> None:
    enter(contestant, ops.dwconv, case, "inference", dtype, device)


@pytest.mark.parametrize("contestant", [OURS, ops.STOCK, COMPILED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", full_unless(SHOWN, CASES))
def test_training(enter, case: DwconvCase, dtype: str, device: str, contestant: str) -> None:
    enter(contestant, ops.dwconv, case, "training", dtype, device)
