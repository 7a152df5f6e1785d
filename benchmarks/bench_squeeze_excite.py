"""Squeeze-and-excitation, on every shape of B0 and B7.

`pytest benchmarks/bench_squeeze_excite.py --benchmark-only`
"""

from __future__ import annotations

import pytest

from benchmarks import op_contests as ops
from benchmarks.contest import OURS
from benchmarks.params import DTYPES, full_unless
from cases import SqueezeExciteCase, squeeze_excite_of

COMPILED = pytest.param(ops.COMPILED, marks=pytest.mark.full)
CASES = [*squeeze_excite_of("b0", batch=1), *squeeze_excite_of("b7", batch=1)]
SHOWN = ("b0_c96_56_r4",)


@pytest.mark.parametrize("contestant", [OURS, ops.STOCK, COMPILED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", full_unless(SHOWN, CASES))
def test_inference(
    enter, case: SqueezeExciteCase, dtype: str, device: str, contestant: str
) -> None:
    enter(contestant, ops.squeeze_excite, case, "inference", dtype, device)


@pytest.mark.parametrize("contestant", [OURS, ops.STOCK, COMPILED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", full_unless(SHOWN, CASES))
def test_training(enter, case: SqueezeExciteCase, dtype: str, device: str, contestant: str) -> None:
    enter(contestant, ops.squeeze_excite, case, "training", dtype, device)
