"""FusedMBConv in the inference kernels, against float64: each kind of block alone, and networks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import effnet_fast
from effnet_fast import use_backend
from effnet_fast.diagnostics import model_report
from effnet_fast.inference.network_spec import spec_of
from effnet_fast.models import EfficientNet, EfficientNetFeatures, Stage
from effnet_fast.models.variants import FUSED
from effnet_fast.modules.layers import Conv2dNormActivation
from effnet_fast.modules.structure import RefusedError
from networks import TINY_V2, random_images, trio
from one_block import (
    DTYPES,
    check_infinite,
    expectations,
    inference_runs,
    randomise,
)
from tolerances import assert_no_worse_than


@dataclass(frozen=True)
class Case:
    """Blocks of one stage behind the stem: ratio, K, stride, channels in and out, and images."""

    name: str
    ratio: int
    kernel: int
    stride: int
    channels: int
    width: int
    height: int
    side: int
    blocks: int = 1
    images: int = 2
    padding: str = "symmetric"
    activation: str = "silu"


CASES = [
    Case("residual", 4, 3, 1, 24, 24, 18, 22, 2),
    Case("stride_2", 4, 3, 2, 24, 48, 17, 22),
    Case("same_even", 4, 3, 2, 16, 24, 16, 20, padding="same"),
    Case("same_odd_5", 2, 5, 2, 8, 16, 15, 13, padding="same"),
    Case("no_project_residual", 1, 3, 1, 24, 24, 14, 30, 2),
    Case("no_project_stride_2", 1, 3, 2, 24, 40, 14, 30),
    Case("channels_of_no_vector", 3, 3, 1, 8, 8, 9, 9, 2),
    Case("k_of_several_chains", 4, 3, 1, 72, 72, 12, 10, 2),
    Case("kernel_7", 2, 7, 1, 16, 16, 14, 14),
    Case("map_lt_kernel", 2, 7, 1, 16, 16, 2, 2),
    Case("row_gt_chunk", 6, 3, 1, 96, 96, 2, 520, images=1),
    Case("one_image", 4, 3, 1, 16, 32, 20, 20, images=1),
    Case("clamp", 4, 3, 2, 24, 24, 10, 12, 2, activation="relu6"),
    Case("hard_swish", 1, 3, 1, 24, 24, 10, 12, activation="hardswish"),
]


def network_of(case: Case) -> nn.Module:
    """An encoder whose last map is the stage's."""
    row = (case.ratio, case.kernel, case.stride, case.channels, case.width, case.blocks, FUSED)
    changes: dict[str, Any] = {"padding": case.padding, "activation": case.activation}
    variant = replace(TINY_V2, name="one", baseline=(Stage(*row),), **changes)
    last = 1 if case.stride == 2 else 0
    return EfficientNetFeatures(variant, out_indices=(last,)).eval()


@inference_runs(CASES)
def test_blocks(case: Case, dtype: torch.dtype, isa: str) -> None:
    torch.manual_seed(0)
    model = randomise(network_of(case))
    x = torch.randn(case.images, 3, 2 * case.height, 2 * case.side)
    exact, stock = expectations(model, x)
    (y,) = effnet_fast.deploy(model, dtype, backend=f"cpu:{isa}")(x)
    assert_no_worse_than(y.to(dtype), stock[dtype], exact)


INFINITE = ("clamp", "same_even", "no_project_residual", "k_of_several_chains")


@inference_runs([case for case in CASES if case.name in INFINITE])
def test_infinite_weights_meet_no_padding(case: Case, dtype: torch.dtype, isa: str) -> None:
    """Whose product with it would be NaN."""
    torch.manual_seed(0)
    model = randomise(network_of(replace(case, blocks=1)))
    x = torch.randn(case.images, 3, 2 * case.height, 2 * case.side)
    check_infinite(model, x, dtype, isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_network(padding: str, dtype: torch.dtype) -> None:
    models = trio(replace(TINY_V2, padding=padding), 48)
    x = random_images(5, 48, seed=3)
    with torch.no_grad():
        exact = models.exact(x.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            stock = models.stock(x)
        deployed = effnet_fast.deploy(models.actual, dtype)
        y = torch.cat([deployed(part) for part in x.split(2)])
        assert_no_worse_than(y.to(dtype), stock, exact)
        weight = models.actual.get_submodule("features.2.1.block.0.0").weight
        weight[[0, 1]] = weight[[1, 0]]
        with pytest.raises(AssertionError, match="error"):
            assert_no_worse_than(deployed(x).to(dtype), stock, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    deployed, x = effnet_fast.deploy(EfficientNet(TINY_V2).eval(), dtype), random_images(3, 64)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [deployed(x), torch.cat([deployed(image[None]) for image in x])]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_taps_of_every_stage() -> None:
    torch.manual_seed(0)
    model = randomise(EfficientNetFeatures(TINY_V2).eval())
    x = random_images(2, 48)
    with torch.no_grad(), use_backend("reference"):
        expected = model(x)
    for actual, map_of_stock in zip(effnet_fast.deploy(model)(x), expected, strict=True):
        torch.testing.assert_close(actual, map_of_stock, rtol=1e-4, atol=1e-4)


def test_its_own_forward_runs_in_one_call_and_follows_edits() -> None:
    model, x = EfficientNet(TINY_V2).eval(), random_images(2, 48)
    (course,) = model_report.explain_networks(model)
    assert (course.eval, course.deploy_reason) == (model_report.ONE_CALL, None)
    with torch.inference_mode(), torch.no_grad():
        before = model(x).clone()
        model.features[1][0].block[0][0].weight.data.mul_(3)
        after = model(x)
        with use_backend("reference"):
            torch.testing.assert_close(after, model(x), rtol=1e-3, atol=1e-5)
    assert not torch.equal(before, after)


def _add_over_a_stride(block: nn.Module) -> None:
    block.block[1] = Conv2dNormActivation(32, 8, 1, activation_layer=None)
    block.use_res_connect = True


def _add_to_other_channels(block: nn.Module) -> None:
    block.block[0][0] = nn.Conv2d(8, 32, 3, 1, 1, bias=False)
    block.use_res_connect = True


CHANGES = {
    "a hook": lambda b: b.block[0].register_forward_hook(lambda *_: None),
    "use_res_connect": lambda b: setattr(b, "use_res_connect", True),
    "a residual over a stride": _add_over_a_stride,
    "a residual of other channels": _add_to_other_channels,
    "bias": lambda b: setattr(b.block[1], "0", nn.Conv2d(32, 16, 1)),
    "kernel": lambda b: setattr(b.block[0], "0", nn.Conv2d(8, 32, (3, 1), 2, 1, bias=False)),
    "groups": lambda b: setattr(b.block[0], "0", nn.Conv2d(8, 32, 3, 2, 1, groups=2, bias=False)),
    "activation": lambda b: b.block[1].append(nn.SiLU()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_it_does_not_know_is_refused(change: str) -> None:
    model = EfficientNet(TINY_V2).eval()
    CHANGES[change](model.features[2][0])
    with pytest.raises(RefusedError, match=r"features\.2\.0"):
        spec_of(model)
