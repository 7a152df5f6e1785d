"""FusedMBConv: a block whose expansion and spatial convolution are one dense convolution.

Source: Tan & Le, "EfficientNetV2" (arXiv 2104.00298), figure 2; names and draw order as
torchvision 0.28.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import nn

from effnet_fast.modules.layers import (
    ACTIVATION_LAYERS,
    Conv2dNormActivation,
    MBConvConfig,
    ResidualBlock,
)

LEAST_KERNEL = 3  # a 1x1 one would be MBConv's expansion, from which names could not tell it


def _layers(config: MBConvConfig, norm_layer: Callable[..., nn.Module]) -> Iterator[nn.Module]:
    """The block's layers in order: dense [, project]."""
    expanded = config.expanded_channels
    projects = expanded != config.input_channels
    conv = partial(Conv2dNormActivation, norm_layer=norm_layer)
    yield conv(
        config.input_channels,
        expanded if projects else config.out_channels,
        kernel_size=config.kernel,
        stride=config.stride,
        padding=config.padding,
        activation_layer=ACTIVATION_LAYERS[config.activation],
    )
    if projects:
        yield conv(expanded, config.out_channels, kernel_size=1, activation_layer=None)


class FusedMBConv(ResidualBlock):
    """A dense convolution that expands, then a 1x1 projection, x [N,Cin,H,W] -> y [N,Cout,Ho,Wo].

    Where the ratio is 1 there is the dense convolution alone, from Cin to Cout. There is no
    squeeze-and-excitation.

    Args:
        config: the block's geometry, its kernel at least 3; `squeeze` has no meaning here.
        stochastic_depth_prob: probability that a sample skips the block's body in training.
        norm_layer: makes a normalisation from its channels.

    Raises:
        ValueError: a kernel below 3.

    Source: Tan & Le (arXiv 2104.00298), figure 2.
    """

    def __init__(
        self,
        config: MBConvConfig,
        stochastic_depth_prob: float,
        norm_layer: Callable[..., nn.Module],
    ) -> None:
        if config.kernel < LEAST_KERNEL:
            raise ValueError(
                f"the kernel of a FusedMBConv must be at least {LEAST_KERNEL}, got {config.kernel}"
            )
        super().__init__(config, _layers(config, norm_layer), stochastic_depth_prob)
