"""The stem: dense convolution + BatchNorm + SiLU of the image, of B0, B4 and B7.

`pytest benchmarks/bench_stem_conv_bn_silu.py --benchmark-only`
"""

from __future__ import annotations

import pytest

from benchmarks import op_contests as ops
from benchmarks.contest import OURS
from benchmarks.params import DTYPES, full_unless
from cases import StemCase, stem_of

COMPILED = pytest.param(ops.COMPILED, marks=pytest.mark.full)
VARIANTS = ("b0", "b4", "b7")


@pytest.mark.parametrize("contestant", [OURS, ops.STOCK, COMPILED, ops.CONV])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", full_unless(("b0_stem",), [stem_of(v) for v in VARIANTS]))
def test_inference(enter, case: StemCase, dtype: str, device: str, contestant: str) -> None:
    enter(contestant, ops.stem, case, "inference", dtype, device)


@pytest.mark.parametrize("contestant", [OURS, ops.STOCK, COMPILED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", full_unless(("b0_stem",), [stem_of(v, 8) for v in VARIANTS]))
def test_training(enter, case: StemCase, dtype: str, device: str, contestant: str) -> None:
    enter(contestant, ops.stem, case, "training", dtype, device)
