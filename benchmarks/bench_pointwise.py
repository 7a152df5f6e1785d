"""1x1 convolution + BN + SiLU with gate and residual, on every shape of B0 and B7.

`pytest benchmarks/bench_pointwise.py --benchmark-only`. There is no training kernel yet.
"""

from __future__ import annotations

import pytest

from benchmarks import op_contests as ops
from benchmarks.contest import OURS
from benchmarks.params import DTYPES, full_unless
from cases import PointwiseCase, pointwise_of

COMPILED = pytest.param(ops.COMPILED, marks=pytest.mark.full)
CASES = [*pointwise_of("b0", batch=1), *pointwise_of("b7", batch=1)]
SHOWN = ("b0_project_c672_112_14_residual",)


@pytest.mark.parametrize("contestant", [OURS, ops.STOCK, COMPILED, ops.CONV])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", full_unless(SHOWN, CASES))
def test_inference(enter, case: PointwiseCase, dtype: str, device: str, contestant: str) -> None:
    enter(contestant, ops.pointwise, case, "inference", dtype, device)
