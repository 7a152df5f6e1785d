"""Lite0's trained weights on photographs: parity where channels are dead and statistics extreme."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import effnet_fast
import trained
from effnet_fast import use_backend
from halves import assert_errors, without_random_layers
from networks import Trio, random_images, rms, run_network
from tolerances import assert_no_worse_than

SIDE = 112  # of training images, pixels
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def training_images() -> Tensor:
    """The photographs and their mirror images, so that statistics are of ten."""
    x = trained.photographs(SIDE)
    return torch.cat([x, x.flip(3)])


def stock_in(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Stock PyTorch's logits in a dtype, by autocast."""
    autocast = dtype is torch.bfloat16
    with torch.no_grad(), use_backend("reference"), torch.autocast("cpu", dtype, enabled=autocast):
        return model(x)


def test_the_weights_are_what_random_ones_are_not() -> None:
    norms = [m for m in trained.network().modules() if isinstance(m, nn.BatchNorm2d)]
    variances = torch.cat([norm.running_var for norm in norms])
    assert int((variances == 0).sum()) > 10  # dead channels
    assert variances.max() > 100
    scales = torch.cat([norm.weight / (norm.running_var + norm.eps).sqrt() for norm in norms])
    assert scales.abs().max() > 10


@DTYPES
def test_deployed(dtype: torch.dtype) -> None:
    models, x = trained.trio(), trained.photographs()
    exact = stock_in(models.exact, x.double(), torch.float32)
    stock = stock_in(models.stock, x, dtype)
    actual = effnet_fast.deploy(models.actual, dtype)(x)
    assert_no_worse_than(actual.to(dtype), stock.to(dtype), exact)
    assert rms(exact[0] - exact[1]) > 100 * rms(stock_in(models.stock, x, torch.float32) - exact)
    # The comparison can fail: two channels of one layer exchanged.
    weight = models.actual.features[4][0].block[1][0].weight
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]]
    swapped = effnet_fast.deploy(models.actual, dtype)(x)
    with pytest.raises(AssertionError, match="error"):
        assert_no_worse_than(swapped.to(dtype), stock.to(dtype), exact)


@DTYPES
def test_the_networks_own_forward(dtype: torch.dtype) -> None:
    models, x = trained.trio(), trained.photographs()
    exact = stock_in(models.exact, x.double(), torch.float32)
    stock = stock_in(models.stock, x, dtype)
    autocast = torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16)
    with torch.inference_mode(), autocast:
        actual = models.actual(x)
        models.actual.plan = False
        by_blocks = models.actual(x)
    for y in (actual, by_blocks):
        assert_no_worse_than(y.to(dtype), stock.to(dtype), exact)


def _of_kind(models: Trio, dtype: torch.dtype, x: Tensor) -> None:
    def run(model: nn.Module) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            return run_network(model, x)

    assert_errors(run, models, x)


@pytest.mark.slow
@DTYPES
def test_train_step(dtype: torch.dtype) -> None:
    """Forward, backward and running statistics, BN in training mode."""
    _of_kind(trained.trio().apply(without_random_layers).train(), dtype, training_images())


@pytest.mark.slow
@DTYPES
def test_fine_tuning_step_with_frozen_statistics(dtype: torch.dtype) -> None:
    """Gradients through the trained statistics: dead channels have rstd 1 / sqrt(eps)."""
    _of_kind(trained.trio(), dtype, trained.photographs(SIDE))


@pytest.mark.slow
def test_a_step_notices_swapped_channels() -> None:
    models = trained.trio().apply(without_random_layers).train()
    weight = models.actual.features[3][1].block[0][0].weight
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]]
    with pytest.raises(AssertionError, match="error"):
        _of_kind(models, torch.float32, training_images())


@pytest.mark.slow
def test_lean_and_fast_memory_agree() -> None:
    x, results = training_images(), []
    for memory in ("fast", "lean"):
        model = trained.network().train()
        without_random_layers(model)
        model.memory = memory
        results.append(run_network(model, x))
    fast, lean = results
    assert all(torch.equal(fast[name], lean[name]) for name in fast)


@pytest.mark.slow
def test_a_deployed_copy_is_bitwise_the_same() -> None:
    model, x = trained.network(), trained.photographs()[:2]
    deployed = effnet_fast.deploy(model)
    assert torch.equal(deployed(x), effnet_fast.deploy(copy.deepcopy(model))(x))
    assert not torch.equal(deployed(x), deployed(random_images(2, 224)))
