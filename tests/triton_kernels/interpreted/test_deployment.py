"""A deployed network on interpreted Triton kernels: its numbers, graphs, and changed weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import networks
from effnet_fast.models import VARIANTS, EfficientNetFeatures
from effnet_fast.triton_kernels import expand_dwconv, mbconv
from launched import Target, assert_parity, recorders
from networks import MINI, random_images
from tiers import some

__all__ = ["recorders"]  # a fixture
TRITON = Target("cpu", "triton")
DTYPES = (torch.float32, torch.float16)


@pytest.mark.exhaustive
def test_b0() -> None:
    """In one dtype: the interpreter takes half a minute and more; fp32 is that of the others."""
    model = networks.pair(VARIANTS["b0"], 48).actual
    assert_parity(TRITON, model, random_images(1, 48), torch.float16, calls=1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", some(DTYPES, DTYPES[:1]))
def test_mini_replayed(dtype: torch.dtype, recorders: list) -> None:
    assert_parity(TRITON, networks.pair(MINI).actual, random_images(2, 17), dtype)
    assert [recorder.count("replay") for recorder in recorders] == [1]


@pytest.mark.parametrize("dtype", some(DTYPES, DTYPES[1:]))
def test_expansion_and_depthwise_convolution_in_one_kernel(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, launched = expand_dwconv.launch_expand_dwconv_fwd, []

    def launch(*args: Any, **options: Any) -> Any:
        launched.append(args[0].shape)
        return fused(*args, **options)

    monkeypatch.setattr(mbconv, "is_joined_quicker", lambda *_: True)
    monkeypatch.setattr(expand_dwconv, "launch_expand_dwconv_fwd", launch)
    assert_parity(TRITON, networks.pair(MINI).actual, random_images(2, 17), dtype, calls=1)
    assert launched


@pytest.mark.exhaustive
def test_encoder_with_same_padding(recorders: list) -> None:
    variant = networks.replace(MINI, padding="same")
    model = EfficientNetFeatures(variant, out_indices=(0, 1))
    model.load_state_dict(networks.calibrated_state(variant))
    assert_parity(TRITON, model.eval(), random_images(2, 32), torch.float32)


def test_edit_is_followed() -> None:
    models, x = networks.pair(MINI), random_images(2, 17)
    deployed = TRITON.deploy(models.actual)
    deployed(x)
    with torch.no_grad():
        for model in models.models:
            model.features[2][0].block[1][0].weight.mul_(1.25)
    networks.assert_alike({"y": deployed(x)}, {"y": models.stock(x).detach()})


def test_bf16_is_refused_by_the_interpreter() -> None:
    with pytest.raises(RuntimeError, match="interpreter computes wrongly"):
        TRITON.deploy(networks.pair(MINI).actual, torch.bfloat16)
