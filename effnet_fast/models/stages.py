"""The stages of a network, built from the rows of its table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import nn

from effnet_fast.models.variants import FUSED, MBCONV, Variant
from effnet_fast.modules.fused_mbconv import FusedMBConv
from effnet_fast.modules.layers import MBConv, ResidualBlock, Sequential

BLOCKS: dict[str, type[ResidualBlock]] = {MBCONV: MBConv, FUSED: FusedMBConv}
Maker = Callable[[], nn.Module]


def makers_of_stages(
    variant: Variant, stochastic_depth_prob: float, norm_layer: Callable[..., nn.Module]
) -> Iterator[Maker]:
    """Makers of the stages; drop-path of block i of n is stochastic_depth_prob * i / n."""
    index = 0
    for stage in variant.stages:
        blocks: list[Maker] = []
        for config in variant.block_configs(stage):
            prob = stochastic_depth_prob * float(index) / variant.blocks
            make: Callable[..., nn.Module] = BLOCKS[stage.kind]
            blocks.append(partial(make, config, prob, norm_layer))
            index += 1
        yield partial(_sequence, blocks)


def _sequence(makers: list[Maker]) -> Sequential:
    return Sequential(*(make() for make in makers))
