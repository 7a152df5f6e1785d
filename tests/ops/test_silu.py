"""SiLU and its slope as the CPU kernels compute them, over all of float32's range that matters.

Beyond +-88 exp(-x) leaves the range of float32: an instruction set that forms it from a polynomial
and an exponent must not let either wrap.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effnet_fast import ops
from parity import BACKENDS

# Relative error in eps of float32. Without FMA x * log2(e) loses digits as |x| grows.
ALLOWED = {"cpu:generic": 32.0}
ALLOWED_WITH_FMA = 8.0
SMALLEST = 2.0**-149
OVERFLOW = -88.7  # below it exp(-x) is inf in float32, and the result may be 0


def silu_and_slope(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """silu(x) and its derivative by a depthwise convolution of 1 x 1 with weight 1."""
    c = 16
    images = x.reshape(1, -1, 1, c).permute(0, 3, 1, 2).detach().requires_grad_()
    one, zero = torch.ones(c), torch.zeros(c)
    y = ops.dwconv_bn_silu(
        images, torch.ones(c, 1, 1, 1), one, zero, zero, one, eps=0.0, padding=0, backend=backend
    )
    (slope,) = torch.autograd.grad(y, images, torch.ones_like(y))
    return tuple(t.detach().permute(0, 2, 3, 1).flatten() for t in (y, slope))


@pytest.mark.parametrize("backend", BACKENDS)
def test_silu_and_its_slope_over_the_whole_range(backend: str) -> None:
    """Against float64, as a share of the value; of the slope, which crosses 0, of its terms too.

    They are s and s * u * (1 - s), with an error of u / 2 eps where s rounds towards 1.
    """
    x = torch.cat(
        [torch.linspace(*r) for r in ((-110, 110, 2**17), (-91, -86, 2**14), (86, 91, 2**14))]
    )
    y, slope = silu_and_slope(x, backend)
    exact = x.double()
    s = torch.sigmoid(exact)
    exact_y, exact_slope = exact * s, s * (1 + exact * (1 - s))
    eps = ALLOWED.get(backend, ALLOWED_WITH_FMA) * torch.finfo(torch.float32).eps
    share = torch.where(x < OVERFLOW, 1.0, eps)
    for actual, wanted, size in (
        (y, exact_y, exact_y.abs()),
        (slope, exact_slope, torch.maximum(s * (1 + exact.abs() / 8), exact_slope.abs())),
    ):
        wrong = ~((actual - wanted).abs() <= share * size + exact.abs() * SMALLEST)
        assert not wrong.any(), (x[wrong][:5], actual[wrong][:5], wanted[wrong][:5])
