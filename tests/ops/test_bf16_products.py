"""Products of bf16 in training, by vdpbf16ps and by the tile unit, where every operand is exact.

Operands that bf16 holds leave the sums in fp32 as the only error, so that one lost pair is seen.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from effnet_fast.backends import can_run
from effnet_fast.ops import mbconv_passes
from effnet_fast.ops.norms import NORM_ROWS, RSTD, SCALE
from parity import channels_last

SUMS = 1e-5  # of a sum's largest value: some thousand products in fp32
BF16_ROUNDING = 2.0**-8
BACKENDS = [
    pytest.param(
        name, marks=[pytest.mark.skip(reason=reason)] if (reason := can_run(name, "mbconv")) else []
    )
    for name in ("cpu:avx512_bf16", "cpu:amx")
]
ANY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
INF = float("inf")


class Shape(NamedTuple):
    """Images of h x w pixels, channels on the narrow side and on the wide one."""

    n: int
    h: int
    w: int
    narrow: int
    wide: int


SHAPES = {
    "odd": Shape(2, 5, 3, 7, 19),
    "whole_tiles": Shape(1, 8, 8, 32, 64),
    "half_tiles": Shape(3, 7, 7, 48, 80),
    "several_chunks": Shape(2, 21, 13, 24, 33),
    "several_sums": Shape(2, 9, 15, 20, 1600),  # a weight gradient's pixels outgrow their memory
}
ANY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def draw(*sizes: int) -> Tensor:
    return channels_last(torch.randn(sizes).bfloat16())


def plain_norm(channels: int) -> Tensor:
    """Of a BatchNorm that changes nothing."""
    norm = torch.zeros(len(NORM_ROWS), channels)
    norm[[SCALE, RSTD]] = 1
    return norm


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [N,C,H,W] by weight [O,C] in float64."""
    return torch.einsum("nchw,oc->nohw", x.double(), weight.double())


def assert_close(actual: Tensor, exact: Tensor) -> None:
    """Within an fp32 sum's error, and the one rounding of a result in bf16."""
    rounding = BF16_ROUNDING if actual.dtype is torch.bfloat16 else 0.0
    bound = SUMS * exact.abs().max() + rounding * exact.abs()
    assert ((actual.double() - exact).abs() <= bound).all()


@ANY_BACKEND
@ANY_SHAPE
@pytest.mark.parametrize("narrow_first", [True, False], ids=["expand", "project"])
def test_forward(narrow_first: bool, shape: Shape, backend: str) -> None:
    n, h, w, narrow, wide = shape
    c, out = (narrow, wide) if narrow_first else (wide, narrow)
    x, weight = draw(n, c, h, w), draw(out, c, 1, 1)
    z, _ = mbconv_passes.passes(backend).expand(x, weight, None, None, None, None, 1e-5)
    assert_close(z, product(x, weight[:, :, 0, 0]))


@ANY_BACKEND
@ANY_SHAPE
def test_expand_backward(shape: Shape, backend: str) -> None:
    n, h, w, c, out = shape
    f, z1, x, weight = draw(n, out, h, w), draw(n, out, h, w), draw(n, c, h, w), draw(out, c, 1, 1)
    grad_x, grad_weight = mbconv_passes.passes(backend).expand_backward(
        f, z1, plain_norm(out), None, x, weight, None, [True, True]
    )
    assert_close(grad_x, product(f, weight[:, :, 0, 0].t()))
    exact = torch.einsum("nohw,nchw->oc", f.double(), x.double())
    assert_close(grad_weight[:, :, 0, 0].float(), exact)


@ANY_BACKEND
@ANY_SHAPE
def test_project_backward(shape: Shape, backend: str) -> None:
    n, h, w, out, c = shape
    grad_y, z3 = draw(n, out, h, w), draw(n, out, h, w)
    z2, weight = draw(n, c, h, w), draw(out, c, 1, 1).float()
    gate = 2.0 ** torch.randint(-2, 2, (n, c))
    e, sums, grad_weight = mbconv_passes.passes(backend).project_backward(
        grad_y, None, z3, plain_norm(out), None, weight, z2, plain_norm(c), gate, [True, True],
        "identity",
    )  # fmt: skip
    assert_close(e, product(grad_y, weight[:, :, 0, 0].t()))
    assert_close(sums[0], (e.double() * z2.double()).sum((2, 3)))
    gated = z2.double() * gate[:, :, None, None].double()
    assert_close(grad_weight[:, :, 0, 0], torch.einsum("nohw,nchw->oc", grad_y.double(), gated))


@ANY_BACKEND
@pytest.mark.parametrize("value", [INF, float("nan")], ids=str)
def test_one_pixel_spoils_no_other(value: float, backend: str) -> None:
    """Nothing that a tile has beyond the last channel or pixel meets the value."""
    n, h, w, c, out = SHAPES["odd"]
    passes = mbconv_passes.passes(backend)
    x, f, weight = draw(n, c, h, w), draw(n, out, h, w), draw(out, c, 1, 1)
    x[0, c - 1, h - 1, w - 1] = f[1, out - 1, h - 1, w - 1] = value
    z, _ = passes.expand(x, weight, None, None, None, None, 1e-5)
    assert torch.equal(z.isfinite(), x.isfinite().all(1, keepdim=True).expand_as(z))
    x[0, c - 1, h - 1, w - 1] = 1
    grad_x, grad_weight = passes.expand_backward(
        f, f, plain_norm(out), None, x, weight, None, [True, True]
    )
    assert torch.equal(grad_x.isfinite(), f.isfinite().all(1, keepdim=True).expand_as(grad_x))
    assert grad_weight[:-1].isfinite().all()
    assert not grad_weight[-1].isfinite().any()


@ANY_BACKEND
def test_one_weight_spoils_its_channel_alone(backend: str) -> None:
    n, h, w, c, out = SHAPES["odd"]
    x, weight = draw(n, c, h, w), draw(out, c, 1, 1)
    weight[-1, -1] = INF
    z, _ = mbconv_passes.passes(backend).expand(x, weight, None, None, None, None, 1e-5)
    assert z[:, :-1].isfinite().all()
    assert not z[:, -1].isfinite().any()
