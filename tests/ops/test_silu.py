"""SiLU and its slope as the ops' kernels compute them, by a convolution that changes nothing.

Beyond +-88 exp(-x) leaves the range of float32: an instruction set that forms it from a polynomial
and an exponent must not let either wrap. tests/csrc/test_silu_forms.py has all floats of the forms
themselves.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from effnet_fast import ops
from parity import BACKENDS, BF16, CUDA_BACKENDS, FP16, Dtypes, device_of, runs
from tolerances import assert_same_places

# Relative error in eps of float32. Without FMA x * log2(e) loses digits as |x| grows.
ALLOWED = {"cpu:generic": 32.0}
ALLOWED_WITH_FMA = 8.0
SMALLEST = 2.0**-149
OVERFLOW = -88.7  # below it exp(-x) is inf in float32, and the result may be 0
FLUSHES = "cpu:avx512_bf16"  # its instruction that rounds to bf16 makes subnormal numbers 0
ROUNDED_ULP = 0.52  # of a 16-bit dtype: half of one to round, the rest for what is rounded


def silu_and_slope(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """silu(x) and its derivative by a depthwise convolution whose weight is 1 in its centre.

    Images are of one pixel: beside an infinite one, a weight of 0 would give NaN.
    """
    c, device = 16, device_of(backend, x)
    images = x.to(device).reshape(-1, c, 1, 1).to(memory_format=torch.channels_last)
    images = images.detach().requires_grad_()
    one, zero = (make(c, dtype=x.dtype, device=device) for make in (torch.ones, torch.zeros))
    weight = F.pad(one.reshape(c, 1, 1, 1), (1, 1, 1, 1))
    y = ops.dwconv_bn_silu(
        images, weight, one, zero, zero, one, eps=0.0, padding=1, backend=backend
    )
    (slope,) = torch.autograd.grad(y, images, torch.ones_like(y))
    return tuple(t.detach().cpu().flatten() for t in (y, slope))


def stock_silu_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = F.silu(x)
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), slope


def exact_silu_and_slope(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, and the sigmoid: the slope crosses 0, its terms s and s * u * (1 - s) do not."""
    x = x.double()
    s = torch.sigmoid(x)
    return x * s, s * (1 + x * torch.sigmoid(-x)), s


def ulp(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring values of a dtype where they are of this size."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(size.clamp_min(info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(size, info.eps), exponent)


@pytest.mark.parametrize("backend", BACKENDS)
def test_silu_and_its_slope_over_the_whole_range(backend: str) -> None:
    """Against float64, as a share of the value; of the slope, which crosses 0, of its terms too.

    They have an error of u / 2 eps where s rounds towards 1.
    """
    x = torch.cat(
        [torch.linspace(*r) for r in ((-110, 110, 2**17), (-91, -86, 2**14), (86, 91, 2**14))]
    )
    y, slope = silu_and_slope(x, backend)
    exact_y, exact_slope, s = exact_silu_and_slope(x)
    eps = ALLOWED.get(backend, ALLOWED_WITH_FMA) * torch.finfo(torch.float32).eps
    share = torch.where(x < OVERFLOW, 1.0, eps)
    for actual, wanted, size in (
        (y, exact_y, exact_y.abs()),
        (slope, exact_slope, torch.maximum(s * (1 + x.double().abs() / 8), exact_slope.abs())),
    ):
        wrong = ~((actual - wanted).abs() <= share * size + x.double().abs() * SMALLEST)
        assert not wrong.any(), (x[wrong][:5], actual[wrong][:5], wanted[wrong][:5])


@pytest.mark.parametrize("backend", [*BACKENDS, *CUDA_BACKENDS])
def test_the_ends_of_float32_are_as_stock_has_them(backend: str) -> None:
    """NaN of NaN and of -inf, as of x / (1 + exp(-x)); the slope is NaN of +inf as well."""
    inf, largest = float("inf"), torch.finfo(torch.float32).max
    ends = [inf, -inf, float("nan"), largest, -largest, 1e30, -1e30, 200.0, -200.0, 0.0, -0.0]
    x = torch.tensor([*ends, SMALLEST, -SMALLEST, 1e-40, -1e-40, 2.0**-126])
    actual, stock = silu_and_slope(x, backend), stock_silu_and_slope(x)
    for ours, theirs in zip(actual, stock, strict=True):
        assert_same_places(ours, theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=SMALLEST, equal_nan=True)


@runs((BF16, FP16))
def test_all_values_of_16_bits(dtypes: Dtypes, backend: str) -> None:
    """Correctly rounded but for what the kernel's own error in float32 moves across a tie."""
    x = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtypes.x)
    exact_y, exact_slope, s = exact_silu_and_slope(x)
    sizes = (exact_y.abs(), torch.maximum(exact_slope.abs(), s))
    actual, stock = silu_and_slope(x, backend), stock_silu_and_slope(x)
    for ours, theirs, exact, size in zip(actual, stock, (exact_y, exact_slope), sizes, strict=True):
        assert_same_places(ours, theirs)
        fades = (x.float() < OVERFLOW) & (ours.abs() <= exact.abs() + SMALLEST)
        if backend == FLUSHES:
            fades |= (exact.abs() < torch.finfo(dtypes.x).tiny) & (ours == 0)
        passes = (ours.double() - exact).abs() <= ROUNDED_ULP * ulp(size, dtypes.x)
        wrong = ~passes & ~fades & exact.isfinite()
        assert not wrong.any(), (x[wrong][:5], ours[wrong][:5], exact[wrong][:5])
