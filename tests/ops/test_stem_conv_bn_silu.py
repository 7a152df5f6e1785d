"""The stem's inference op against Conv2d, BatchNorm2d and SiLU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import LARGE_STEM_CASES, STEM_CASES, StemCase, find
from effnet_fast.ops.stem_conv_bn_silu import eval_op
from parity import BACKENDS, DTYPES, Dtypes, assert_parity, channels_last

EPS = 1e-3


def tensors(case: StemCase, dtypes: Dtypes) -> list[Tensor]:
    """x, weight, bn_weight, bn_bias, running_mean, running_var."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.n, case.c, case.h, case.w, generator=generator)
    weight = torch.randn(case.out, case.c, case.k, case.k, generator=generator) / case.k
    vectors = torch.rand(4, case.out, generator=generator) + 0.25
    return [channels_last(x.to(dtypes.x)), *(t.to(dtypes.parameters) for t in (weight, *vectors))]


def stock(case: StemCase, x: Tensor, weight: Tensor, *bn: Tensor | None) -> Tensor:
    gamma, beta, mean, var = bn
    z = F.conv2d(F.pad(x, case.padding), weight.to(x.dtype), None, case.stride)
    return F.silu(F.batch_norm(z, mean, var, gamma, beta, eps=EPS))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not_affine"])
@pytest.mark.parametrize("case", STEM_CASES + LARGE_STEM_CASES)
def test_matches_stock(case: StemCase, affine: bool, dtypes: Dtypes, backend: str) -> None:
    given = tensors(case, dtypes)
    if not affine:
        given[2:4] = None, None
    options = ([case.stride] * 2, list(case.padding), EPS, backend)
    doubles = [None if t is None else t.double() for t in given]
    results = (eval_op(*given, *options), stock(case, *given), stock(case, *doubles))
    assert_parity(*({"y": y} for y in results), dtypes.x)


def test_nchw_input() -> None:
    case = find(STEM_CASES, "out_odd")
    x, *others = tensors(case, DTYPES[0])
    options = ([case.stride] * 2, list(case.padding), EPS, "cpu")
    y = eval_op(x.contiguous(), *others, *options)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, eval_op(x, *others, *options))
