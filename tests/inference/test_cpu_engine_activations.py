"""The inference kernels with every activation and gate, with and without squeeze-and-excitation."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import nn

import effnet_fast
from cases import MBCONV_CASES, MBConvCase
from effnet_fast import use_backend
from effnet_fast.models import VARIANTS, EfficientNet
from networks import random_images
from one_block import (
    DTYPES,
    Kind,
    check_infinite,
    expectations,
    inference_runs,
    network_of,
    randomise,
)
from tolerances import assert_no_worse_than

# A Lite network of few channels: ReLU6 and no squeeze-and-excitation.
TINY_LITE = replace(VARIANTS["lite0"], name="tiny", width=0.25, depth=0.5, resolution=48, head=None)


class Block(NamedTuple):
    """What a block has in the place of SiLU and sigmoid."""

    activation: Kind
    gate: Kind | None  # None: no squeeze-and-excitation

    def __str__(self) -> str:
        return f"{self.activation.__name__}-{self.gate and self.gate.__name__}"


KINDS = (
    Block(nn.ReLU6, None),
    Block(nn.ReLU, nn.Hardsigmoid),
    Block(nn.Hardswish, nn.Hardsigmoid),
    Block(nn.Hardswish, None),
    Block(nn.SiLU, None),
)
NAMES = ("c_odd_stride_2", "no_expansion_residual", "k7", "c_gt_tile", "w_gt_tile_k5")
CASES = [p.values[0] for p in MBCONV_CASES if p.values[0].name in NAMES]


@inference_runs(CASES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_block(kind: Block, case: MBConvCase, dtype: torch.dtype, isa: str) -> None:
    torch.manual_seed(0)
    model, x = randomise(network_of(case, *kind)), torch.randn(case.n, 3, case.h, case.w)
    exact, stock = expectations(model, x)
    (y,) = effnet_fast.deploy(model, dtype, backend=f"cpu:{isa}")(x)
    assert_no_worse_than(y.to(dtype), stock[dtype], exact)


@inference_runs(case for case in CASES if case.name != "c_gt_tile")
@pytest.mark.parametrize("activation", [nn.ReLU6, nn.Hardswish, nn.SiLU])
def test_infinite_weights_meet_no_padding(
    activation: Kind, case: MBConvCase, dtype: torch.dtype, isa: str
) -> None:
    """Whose product with it would be NaN."""
    torch.manual_seed(0)
    model = randomise(network_of(case, activation, None))
    check_infinite(model, torch.randn(case.n, 3, case.h, case.w), dtype, isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_network_whose_images_and_threads_do_not_matter(dtype: torch.dtype) -> None:
    """Rows are projected as they are filtered where one thread has all of their channels."""
    torch.manual_seed(0)
    model, x = randomise(EfficientNet(TINY_LITE)), random_images(4, 48, seed=7)
    with torch.no_grad(), use_backend("reference"):
        exact = copy.deepcopy(model).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            stock = model(x)
    deployed, threads = effnet_fast.deploy(model, dtype), torch.get_num_threads()
    y = deployed(x)
    assert_no_worse_than(y.to(dtype), stock, exact)
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            alone = torch.cat([deployed(image[None]) for image in x])
            for other in (alone, deployed(x)):
                torch.testing.assert_close(other, y, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)
