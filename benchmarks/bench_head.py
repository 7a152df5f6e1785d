"""1x1 convolution + BN + SiLU + mean over the pixels, on the last layer of B0 and B7.

`pytest benchmarks/bench_head.py --benchmark-only`
"""

from __future__ import annotations

import pytest

from benchmarks import op_contests as ops
from benchmarks.contest import OURS
from benchmarks.params import DTYPES, full_unless
from cases import PointwiseCase, head_of

COMPILED = pytest.param(ops.COMPILED, marks=pytest.mark.full)
CASES = [*head_of("b0", batch=1), *head_of("b7", batch=1)]
TRAINED = [*head_of("b0", batch=8), *head_of("b7", batch=4)]
SHOWN = ("b0_head",)


@pytest.mark.parametrize("contestant", [OURS, ops.STOCK, COMPILED, ops.CONV])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", full_unless(SHOWN, CASES))
def test_inference(enter, case: PointwiseCase, dtype: str, device: str, contestant: str) -> None:
    enter(contestant, ops.head, case, "inference", dtype, device)


@pytest.mark.parametrize("contestant", [OURS, ops.STOCK, COMPILED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", full_unless(SHOWN, TRAINED))
def test_training(enter, case: PointwiseCase, dtype: str, device: str, contestant: str) -> None:
    enter(contestant, ops.head, case, "training", dtype, device)
