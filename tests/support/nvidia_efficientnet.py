"""A block and a network as NVIDIA's repository names them, written anew; see `nvidia_common`."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

NAME = "image_classification.models"


def stand_in() -> tuple[ModuleType, ModuleType]:
    """The modules under the names that the repository's own have: of blocks, and of their parts."""
    for package in ("image_classification", NAME):
        parent = importlib.machinery.ModuleSpec(package, None, is_package=True)
        sys.modules[package] = importlib.util.module_from_spec(parent)
    for name in ("common", "efficientnet"):
        path = Path(__file__).with_name(f"nvidia_{name}.py")
        spec = importlib.util.spec_from_file_location(f"{NAME}.{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[f"{NAME}.efficientnet"], sys.modules[f"{NAME}.common"]


def _layer(
    cin: int, cout: int, kernel: int, last: str = "", act: type = nn.SiLU, **options: int
) -> nn.Sequential:
    conv = nn.Conv2d(cin, cout, kernel, padding=kernel // 2, bias=False, **options)
    rows = [("conv", conv), ("bn", nn.BatchNorm2d(cout, 1e-3, 0.01))]
    return nn.Sequential(OrderedDict([*rows, *([(last, act())] if last else [])]))


class MBConvBlock(nn.Module):
    def __init__(
        self, cin: int = 16, cout: int = 16, kernel: int = 3, stride: int = 1, ratio: int = 4,
        survival: float = 0.8, excite: str = "SequentialSqueezeAndExcitation", act: type = nn.SiLU,
    ) -> None:  # fmt: skip
        super().__init__()
        parts: Any = importlib.import_module(f"{NAME}.common")
        width = cin * ratio
        self.quantized = False
        self.residual = stride == 1 and cin == cout
        self.expand = None if ratio == 1 else _layer(cin, width, 1, "act", act)
        self.depsep = _layer(width, width, kernel, "act", act, stride=stride, groups=width)
        self.se = getattr(parts, excite)(width, cin // 4, act())
        self.proj = _layer(width, cout, 1)
        drops = survival < 1
        self.residual_add = parts.StochasticDepthResidual(survival) if drops else torch.add
        self.residual_quantizer = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        body = x if self.expand is None else self.expand(x)
        body = self.proj(self.se(self.depsep(body)))
        if self.residual:
            body = self.residual_add(x, body)
        return body


class EfficientNet(nn.Module):
    def __init__(self, survival: float = 1.0) -> None:
        super().__init__()
        parts: Any = importlib.import_module(f"{NAME}.common")
        rows = [(16, 16, 3, 1, 1), (16, 24, 3, 2, 4), (24, 24, 5, 1, 4)]
        blocks = [MBConvBlock(*row, survival) for row in rows]
        self.stem = _layer(3, 16, 3, "activation", stride=2)
        self.layers = nn.Sequential(nn.Sequential(blocks[0]), nn.Sequential(*blocks[1:]))
        self.features = _layer(24, 64, 1, "activation")
        top = [
            ("pooling", nn.AdaptiveAvgPool2d(1)), ("squeeze", parts.Flatten()),
            ("dropout", nn.Dropout(0.2)), ("fc", nn.Linear(64, 10)),
        ]  # fmt: skip
        self.classifier = nn.Sequential(OrderedDict(top))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.classifier(self.features(self.layers(self.stem(x))))
        return result
