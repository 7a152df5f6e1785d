"""SiLU, its slope and the sigmoid over every exponent and sign of float32, interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from effnet_fast.triton_kernels.elementwise import sigmoid, silu, silu_grad
from effnet_fast.triton_kernels.expand_dwconv import quick_silu

LEAST = -87.0  # below it a sigmoid may be 0, as exp(-u) may be infinite
ERROR = 5e-6  # of the value: u * log2(e) is rounded before exp2 is taken
BLOCK = 4096
DENSITIES = [64, pytest.param(1024, marks=pytest.mark.exhaustive)]  # mantissas of an exponent
FORMS = {"sigmoid": sigmoid, "silu": silu, "quick_silu": quick_silu, "silu_grad": silu_grad}


@triton.jit
def apply_kernel(x, y, form: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(y + at, form(tl.load(x + at)))


def applied(form: Any, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    apply_kernel[len(x) // BLOCK,](x, y, form=form, block=BLOCK)
    return y


def exact(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """In float64: the value, and the size of its terms where it crosses 0."""
    x = x.double()
    s, rest = torch.sigmoid(x), torch.sigmoid(-x)
    value = {"sigmoid": s, "silu_grad": s * (1 + x * rest)}.get(name, x * s)
    return value, s * (1 + x.abs() * rest) if name == "silu_grad" else value.abs()


@pytest.mark.parametrize("mantissas", DENSITIES)
@pytest.mark.parametrize("name", FORMS)
def test_every_exponent(name: str, mantissas: int) -> None:
    step = 2**23 // mantissas
    bits = torch.arange(-(2**31), 2**31, step)
    bits += torch.randint(step, bits.shape, generator=torch.Generator().manual_seed(0))
    x = bits.to(torch.int32).view(torch.float32)
    y, (wanted, size) = applied(FORMS[name], x), exact(name, x)
    finite = x.isfinite()
    fades = (x < LEAST) & (y.abs() <= wanted.abs() * (1 + ERROR) + 2.0**-149)
    passes = (y.double() - wanted).abs() <= ERROR * size + 2.0**-148
    wrong = finite & ~fades & ~passes
    assert not wrong.any(), (x[wrong][:5], y[wrong][:5], wanted[wrong][:5])
    assert y[x.isnan()].isnan().all()


@pytest.mark.parametrize("name", FORMS)
def test_infinities(name: str) -> None:
    x = torch.zeros(BLOCK)
    x[0], x[1] = float("inf"), float("-inf")
    y = applied(FORMS[name], x)[:2]
    nan, inf = float("nan"), float("inf")
    ends = {"sigmoid": (1.0, 0.0), "silu_grad": (nan, nan)}.get(name, (inf, nan))
    torch.testing.assert_close(y, torch.tensor(ends), rtol=0, atol=0, equal_nan=True)
