"""A weight of another dtype than the images: PyTorch raises, and so do the fused forwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from effnet_fast import use_backend
from effnet_fast.modules.fused_mbconv import FusedMBConv
from effnet_fast.modules.layers import Conv2dNormActivation, MBConv, MBConvConfig

CONFIG = MBConvConfig(4, 3, 1, 8, 8)
MODULES: dict[str, Callable[[], nn.Module]] = {
    "mbconv": lambda: MBConv(CONFIG, 0.0, nn.BatchNorm2d),
    "fused_mbconv": lambda: FusedMBConv(CONFIG, 0.0, nn.BatchNorm2d),
    "depthwise": lambda: Conv2dNormActivation(8, 8, groups=8, activation_layer=nn.SiLU),
    "stem": lambda: Conv2dNormActivation(8, 8, activation_layer=nn.SiLU),
    "pointwise": lambda: Conv2dNormActivation(8, 8, 1, activation_layer=nn.SiLU),
}
CASES = [
    pytest.param(name, place, id=f"{name}-{place}")
    for name, make in MODULES.items()
    for place, child in make().named_modules()
    if isinstance(child, nn.Conv2d)
]


def outcome(module: nn.Module, x: Tensor, backend: str) -> type[Exception] | torch.dtype:
    """The dtype of what it gives, or the kind of error that it raises."""
    try:
        with use_backend(backend):
            return module(x).dtype
    except RuntimeError as error:
        return type(error)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("name", "place"), CASES)
def test_another_dtype_of_a_weight_raises(name: str, place: str, training: bool) -> None:
    for dtype, other in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        module = MODULES[name]().to(dtype).train(training)
        module.get_submodule(place).to(other)
        x = torch.randn(2, 8, 6, 6).to(dtype)
        assert outcome(module, x, "reference") is RuntimeError
        assert outcome(module, x, "auto") is RuntimeError


@pytest.mark.parametrize("name", MODULES)
def test_norms_may_be_wider(name: str) -> None:
    """As in stock, and the kernels take them."""
    module = MODULES[name]().to(torch.bfloat16)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.float()
    x = torch.randn(2, 8, 6, 6).to(torch.bfloat16)
    assert outcome(module, x, "auto") is outcome(module, x, "reference") is torch.bfloat16
