"""Networks on a CUDA device: the same numbers as torchvision's there, in every dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import effnet_fast
from effnet_fast.modules import fused_forward
from effnet_fast.modules.layers import MBConv
from networks import TINY, random_images, trio

pytestmark = pytest.mark.gpu
SIDE = 65


@pytest.fixture(autouse=True)
def _device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The depthwise convolutions of the blocks that kernels ran, in order."""
    seen: list[nn.Module] = []
    run = fused_forward._run_block
    monkeypatch.setattr(
        fused_forward, "_run_block", lambda b, *rest: seen.append(b.depthwise.conv) or run(b, *rest)
    )
    return seen


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parity(dtype: torch.dtype, training: bool, fused: list[nn.Module]) -> None:
    three = trio(TINY, SIDE).apply(lambda model: model.cuda())
    three.actual.to(dtype)
    three.stock.to(dtype)
    three.train(training)
    images = [random_images(8, SIDE, seed=seed).cuda().to(dtype) for seed in range(2, 6)]
    three.assert_parity(*images)
    blocks = [module for module in three.actual.modules() if isinstance(module, MBConv)]
    assert fused == [block.block[-3][0] for block in blocks] * len(images)


def test_autocast_gives_stocks_dtype() -> None:
    three = trio(TINY, SIDE).apply(lambda model: model.cuda())
    x = random_images(2, SIDE).cuda()
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        assert three.actual(x).dtype == three.stock(x).dtype


def test_doctor_names_the_device() -> None:
    assert torch.cuda.get_device_name() in str(effnet_fast.doctor())
