"""The CUDA kernels alone on every shape of B0, B4 and B7 at batch 64.

`pytest benchmarks/bench_cuda.py --benchmark-only -m gpu`
"""

from __future__ import annotations

import pytest

from benchmarks import cuda_contests as cuda
from benchmarks import op_contests as ops
from benchmarks import pass_contests as passes
from benchmarks.contest import OURS
from benchmarks.params import full_unless, require
from cases import DwconvCase, SqueezeExciteCase, dwconv_of, squeeze_excite_of

pytestmark = pytest.mark.gpu
VARIANTS = ("b0", "b4", "b7")
BATCH = 64
DWCONV = [case for variant in VARIANTS for case in dwconv_of(variant, batch=BATCH)]
EXCITE = [case for variant in VARIANTS for case in squeeze_excite_of(variant, batch=BATCH)]
SHOWN = ("b0_c240_28_k5_s1",)
SHOWN_EXCITE = ("b0_c240_28_r10",)
ANY_DTYPE = pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.full)])
COMPILED = pytest.param(ops.COMPILED, marks=pytest.mark.full)


@pytest.fixture
def device() -> str:
    """The GPU."""
    require("cuda")
    return "cuda"


@pytest.mark.parametrize(
    "contestant", [OURS, ops.STOCK, cuda.NATIVE, COMPILED, ops.CONV, cuda.CONV_NATIVE]
)
@ANY_DTYPE
@pytest.mark.parametrize("case", full_unless(SHOWN, DWCONV))
def test_dwconv(enter, case: DwconvCase, dtype: str, device: str, contestant: str) -> None:
    enter(contestant, cuda.dwconv, case, "inference", dtype, device)


@pytest.mark.parametrize("contestant", [OURS, ops.STOCK, cuda.NATIVE, COMPILED])
@ANY_DTYPE
@pytest.mark.parametrize("case", full_unless(SHOWN, DWCONV))
def test_dwconv_step(enter, case: DwconvCase, dtype: str, device: str, contestant: str) -> None:
    """Forward and backward in training."""
    enter(contestant, cuda.dwconv, case, "training", dtype, device)


@pytest.mark.parametrize("contestant", [OURS, ops.STOCK, cuda.NATIVE, COMPILED])
@ANY_DTYPE
@pytest.mark.parametrize("case", full_unless(SHOWN, DWCONV))
def test_dwconv_backward(enter, case: DwconvCase, dtype: str, device: str, contestant: str) -> None:
    enter(contestant, cuda.dwconv_backward, case, "training", dtype, device)


@pytest.mark.parametrize("contestant", [OURS, ops.STOCK, cuda.NATIVE, COMPILED])
@ANY_DTYPE
@pytest.mark.parametrize("case", full_unless(SHOWN_EXCITE, EXCITE))
def test_squeeze_excite(
    enter, case: SqueezeExciteCase, dtype: str, device: str, contestant: str
) -> None:
    enter(contestant, cuda.squeeze_excite, case, "inference", dtype, device)


@pytest.mark.parametrize("contestant", [OURS, ops.STOCK, cuda.NATIVE, COMPILED])
@ANY_DTYPE
@pytest.mark.parametrize("case", full_unless(SHOWN_EXCITE, EXCITE))
def test_squeeze_excite_backward(
    enter, case: SqueezeExciteCase, dtype: str, device: str, contestant: str
) -> None:
    enter(contestant, cuda.squeeze_excite_backward, case, "training", dtype, device)


@pytest.mark.parametrize("contestant", [OURS, ops.STOCK])
@ANY_DTYPE
@pytest.mark.parametrize("what", ["squeeze", "finish", "bn_sums"])
@pytest.mark.parametrize("case", full_unless(SHOWN_EXCITE, EXCITE))
def test_pass(
    enter, case: SqueezeExciteCase, what: str, dtype: str, device: str, contestant: str
) -> None:
    """The passes of a block that read and write expanded tensors, alone."""
    enter(contestant, getattr(passes, what), case, dtype, device)
