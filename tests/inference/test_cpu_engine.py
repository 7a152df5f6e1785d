"""The inference kernels against float64: every block's shape alone, and whole networks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effnet_fast
import tiers
from cases import LARGE_MBCONV_CASES, MBCONV_CASES, MBConvCase
from effnet_fast.models import VARIANTS
from networks import PUBLISHED, random_images, reduced_resolution, trio
from one_block import DTYPES, expectations, inference_runs, network_of, randomise
from tolerances import assert_no_worse_than


@functools.lru_cache(maxsize=2)
def expectation(case: MBConvCase) -> tuple[nn.Module, Tensor, Tensor, dict[torch.dtype, Tensor]]:
    """The network of a block, x, y in float64, and stock's y in each dtype."""
    torch.manual_seed(0)
    model, x = randomise(network_of(case)), torch.randn(case.n, 3, case.h, case.w)
    return model, x, *expectations(model, x)


@inference_runs(param.values[0] for param in MBCONV_CASES)
def test_block(case: MBConvCase, dtype: torch.dtype, isa: str) -> None:
    model, x, exact, stock = expectation(case)
    (y,) = effnet_fast.deploy(model, dtype, backend=f"cpu:{isa}")(x)
    assert_no_worse_than(y.to(dtype), stock[dtype], exact)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE_MBCONV_CASES)
def test_large_block(case: MBConvCase, dtype: torch.dtype) -> None:
    model, x, exact, stock = expectation(case)
    (y,) = effnet_fast.deploy(model, dtype)(x)
    assert_no_worse_than(y.to(dtype), stock[dtype], exact)


def assert_parity(models: Any, x: Tensor, batch: int = 2) -> None:
    """fp32, and bf16 against stock's autocast, over x [N,C,H,W] in batches."""
    with torch.no_grad():
        exact = models.exact(x.double())
        for dtype in DTYPES:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                stock = models.stock(x)
            deployed = effnet_fast.deploy(models.actual, dtype)
            y = torch.cat([deployed(part) for part in x.split(batch)])
            assert_no_worse_than(y.to(dtype), stock, exact)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "batch"),
    [(65, 1), *(pytest.param(193, batch, marks=pytest.mark.exhaustive) for batch in (1, 3, 8))],
)
def test_odd_resolution(side: int, batch: int) -> None:
    models = trio(VARIANTS["b0"], side)
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(8, 3, side, side * 4 // 3, generator=generator)
    assert_parity(models, images, batch)


@pytest.mark.slow
@pytest.mark.parametrize("size", tiers.networks(PUBLISHED))
def test_network(size: str) -> None:
    variant = VARIANTS[size]
    side = reduced_resolution(variant)
    models = trio(variant, side)
    x = random_images(4, side, seed=6)  # of one image's logits the error is a matter of luck
    assert_parity(models, x)
    assert_fault_is_noticed(models, x)


def assert_fault_is_noticed(models: Any, x: Tensor) -> None:
    """Two channels swapped in a weight in the middle of the network."""
    weight = models.actual.features[4][0].block[1][0].weight
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]]
    with pytest.raises(AssertionError, match="error"):
        assert_parity(models, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_of_a_batch_are_independent(dtype: torch.dtype) -> None:
    """Each image's result is that of the batch to the bit, whatever shares its batch."""
    models, x = trio(), random_images(5, 48, seed=7)
    deployed = effnet_fast.deploy(models.actual, dtype)
    alone = torch.cat([deployed(image[None]) for image in x])
    torch.testing.assert_close(deployed(x), alone, rtol=0, atol=0)
