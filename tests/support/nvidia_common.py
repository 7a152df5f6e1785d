"""Parts of a block as NVIDIA's repository names them, written anew: it is no package to install."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Flatten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class ONNXSiLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) * x


class _Excite(nn.Module):
    layer: type[nn.Module] = nn.Linear
    options: tuple[int, ...] = ()

    def __init__(self, channels: int, reduced: int, activation: nn.Module) -> None:
        super().__init__()
        self.begin()
        self.squeeze = self.layer(channels, reduced, *self.options)
        self.expand = self.layer(reduced, channels, *self.options)
        self.activation, self.sigmoid = activation, nn.Sigmoid()
        self.quantized = False
        self.mul_a_quantizer, self.mul_b_quantizer = nn.Identity(), nn.Identity()

    def begin(self) -> None:
        """Makes what comes before."""


class SequentialSqueezeAndExcitation(_Excite):
    def _attention(self, x: Tensor) -> Tensor:
        reduced = self.activation(self.squeeze(x.mean((2, 3))))
        return self.sigmoid(self.expand(reduced))[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return x * self._attention(x)


class SequentialSqueezeAndExcitationTRT(_Excite):
    layer = nn.Conv2d
    options = (1,)

    def begin(self) -> None:
        self.pooling = nn.AdaptiveAvgPool2d(1)

    def _attention(self, x: Tensor) -> Tensor:
        return self.sigmoid(self.expand(self.activation(self.squeeze(self.pooling(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return x * self._attention(x)


class StochasticDepthResidual(nn.Module):
    mask: Tensor

    def __init__(self, survival_prob: float) -> None:
        super().__init__()
        self.survival_prob = survival_prob
        self.register_buffer("mask", torch.tensor(1.0), persistent=False)

    def forward(self, residual: Tensor, x: Tensor) -> Tensor:
        if self.training:
            x = x * F.dropout(self.mask, 1 - self.survival_prob)
        return residual + x
