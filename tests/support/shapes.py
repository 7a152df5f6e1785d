"""Every convolution, squeeze-and-excitation and block of the networks, read off the networks.

The one table of shapes for tests and benchmarks; nothing in it is typed by hand.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from effnet_fast.models import VARIANTS, EfficientNet, Variant
from effnet_fast.modules.layers import SqueezeExcitation


@dataclass(frozen=True)
class DenseShape:
    """The first convolution, or the head's: K, stride, channels, sides of input and output."""

    channels: int
    out_channels: int
    size: int
    out_size: int
    kernel: int
    stride: int


@dataclass(frozen=True)
class BlockShape:
    """One MBConv: sides of the square input and output, and its convolutions' sizes.

    Attributes:
        size, out_size: sides, pixels.
        stride, kernel: of the depthwise convolution.
        channels: of the input, of the depthwise convolution, of the output.
        squeezed: channels inside squeeze-and-excitation, 0 where there is none.
        residual: whether the input is added to the output.
    """

    size: int
    out_size: int
    stride: int
    kernel: int
    channels: tuple[int, int, int]
    squeezed: int
    residual: bool

    @property
    def expands(self) -> bool:
        return self.channels[0] != self.channels[1]


@dataclass(frozen=True)
class NetworkShapes:
    """A network's layers in order, repeated ones repeated."""

    stem: DenseShape
    blocks: tuple[BlockShape, ...]
    head: DenseShape


@functools.cache
def shapes_of(variant: Variant | str, resolution: int | None = None) -> NetworkShapes:
    """The shapes of a network at a resolution, its own unless told another."""
    variant = VARIANTS[variant] if isinstance(variant, str) else variant
    with torch.device("meta"):
        model = EfficientNet(variant)
    size = resolution or variant.resolution
    stem = _dense(model.features[0][0], size)
    size = stem.out_size
    blocks = []
    for module in (block for stage in model.features[1:-1] for block in stage):
        *before, project = module.block
        squeeze = before.pop() if isinstance(before[-1], SqueezeExcitation) else None
        conv = before[-1][0]
        out_size = _out_size(conv, size)
        channels = (module.block[0][0].in_channels, conv.out_channels, project[0].out_channels)
        blocks.append(
            BlockShape(
                *(size, out_size, conv.stride[0], conv.kernel_size[0], channels),
                *(squeeze.fc1.out_channels if squeeze else 0, module.use_res_connect),
            )
        )
        size = out_size
    return NetworkShapes(stem, tuple(blocks), _dense(model.features[-1][0], size))


def _dense(conv: torch.nn.Conv2d, size: int) -> DenseShape:
    sides = (size, _out_size(conv, size))
    return DenseShape(
        conv.in_channels, conv.out_channels, *sides, conv.kernel_size[0], conv.stride[0]
    )


def _out_size(conv: torch.nn.Conv2d, size: int) -> int:
    with torch.device("meta"):
        return conv(torch.empty(1, conv.in_channels, size, size)).shape[-1]
