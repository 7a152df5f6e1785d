"""Blocks of efficientnet_pytorch and of its two copies, as single modules, and runs of them."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from parity import channels_last, random_like

PACKAGES = {
    "efficientnet_pytorch": ("efficientnet_pytorch.model", "efficientnet_pytorch.utils"),
    "efficientnet_lite_pytorch": (
        "efficientnet_lite_pytorch.model", "efficientnet_lite_pytorch.utils",
    ),
    "segmentation_models_pytorch": ("segmentation_models_pytorch.encoders._efficientnet",) * 2,
}  # fmt: skip
ANY_PACKAGE = pytest.mark.parametrize("package", PACKAGES)
CHANNELS = 16


def modules(package: str) -> tuple[ModuleType, ModuleType]:
    """Those that have a package's block, and the classes of its children."""
    if package == "segmentation_models_pytorch":
        pytest.importorskip(package, reason=f"{package} is not among the packages of the tests")
    block, parts = map(importlib.import_module, PACKAGES[package])
    return block, parts


def block(package: str, **options: Any) -> nn.Module:
    """A block of CHANNELS channels whose norms have seen images.

    Args:
        options: fields of `BlockArgs`; `size` of the image that paddings are made for, and of
            efficientnet_lite_pytorch `relu_fn`.
    """
    home, parts = modules(package)
    fields = {
        "num_repeat": 1, "kernel_size": 3, "stride": 1, "expand_ratio": 4, "se_ratio": 0.25,
        "input_filters": CHANNELS, "output_filters": CHANNELS, "id_skip": True,
    }  # fmt: skip
    size, relu = options.pop("size", None), options.pop("relu_fn", None)
    own = {"batch_norm_momentum": 0.99, "batch_norm_epsilon": 1e-3}
    given = parts.GlobalParams(**own, **({"relu_fn": relu} if relu else {}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = home.MBConvBlock(parts.BlockArgs(**(fields | options)), given, size)
        for norm in [m for m in made.modules() if isinstance(m, nn.BatchNorm2d)]:
            for tensor in (norm.weight, norm.running_var):
                nn.init.uniform_(tensor, 0.5, 2.0)
            for tensor in (norm.bias, norm.running_mean):
                nn.init.normal_(tensor)
    return made


def run(module: nn.Module, x: Tensor, rate: float | None = None) -> dict[str, Tensor]:
    """Output, gradients and buffers of a call under seed 0, by autocast for images in bf16."""
    module.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    narrow = torch.autocast("cpu", torch.bfloat16, enabled=x.dtype is torch.bfloat16)
    with torch.random.fork_rng(), narrow:
        torch.manual_seed(0)
        y = module(x, rate)
    y.backward(random_like(y))
    grads = {"x": x.grad} | {name: p.grad for name, p in module.named_parameters()}
    results = {"y": y.detach()} | {f"grad {k}": v for k, v in grads.items() if v is not None}
    return results | {k: v.clone() for k, v in module.named_buffers()}


def exact(module: nn.Module, x: Tensor, rate: float | None) -> dict[str, Tensor]:
    """The same in float64, with the rows dropped that a call on x drops."""
    if not rate:
        return run(module, x.double())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kept = (1 - rate + torch.rand([len(x), 1, 1, 1], dtype=x.dtype)).floor()
    drawn = kept.double() * 0.999999  # what makes the same rows of it
    with mock.patch.object(torch, "rand", return_value=drawn):
        return run(module, x.double(), rate)


def stacked(
    call: Callable[[nn.Module, Tensor], dict[str, Tensor]], module: nn.Module, xs: list[Tensor]
) -> dict[str, Tensor]:
    rows = [call(module, x) for x in xs]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def images(height: int, width: int, dtype: torch.dtype, count: int = 1) -> list[Tensor]:
    """Images of CHANNELS channels, channels_last in bf16."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(4, CHANNELS, height, width, generator=generator) for _ in range(count)]
    return drawn if dtype is torch.float32 else [channels_last(x.to(dtype)) for x in drawn]


def copies(module: nn.Module, count: int) -> list[nn.Module]:
    return [copy.deepcopy(module) for _ in range(count)]


@contextlib.contextmanager
def counted(owner: Any, name: str) -> Any:
    """A function with its calls written down: what it gave."""
    given: list[Any] = []
    function = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given.append(function(*args, **kwargs))
        return given[-1]

    with mock.patch.object(owner, name, wrapper):
        yield given
