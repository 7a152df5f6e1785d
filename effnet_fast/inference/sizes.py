"""What a packed network takes and gives, as numbers that no later edit of a module changes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from effnet_fast.inference.network_spec import NetworkSpec
from effnet_fast.modules.structure import Geometry, Layer, weights_of
from effnet_fast.ops.layout import is_nhwc, makes_nhwc, to_nchw


class WrongSizeError(ValueError):
    """A packed network has no result for images of this size, or another than stock."""


@dataclass(frozen=True)
class Row:
    """A convolution that changes the maps' size, and what is seen of its block's result."""

    geometry: Geometry
    channels: int  # of that result
    tap: int  # the output that shows it, -1 for none
    is_nhwc: bool  # whether a weight up to here makes stock's maps channels_last


@dataclass(frozen=True)
class Sizes:
    """Copied from the tensors as they are packed."""

    in_channels: int  # of the images
    outputs: int  # channels of what comes out beside the taps, 0 for nothing
    rows: tuple[Row, ...]  # stem and blocks
    window: int | None = None  # as in `NetworkSpec`

    def maps(self, height: int, width: int) -> list[tuple[int, int, int]]:
        """(C, H, W) of every tap for images of this size.

        Raises:
            WrongSizeError: a convolution has no output, or the last map is above `window`.
        """
        size, found = (height, width), {}
        for row in self.rows:
            size = row.geometry.out_size(*size)
            if min(size) < 1:
                raise WrongSizeError(f"images of {height}x{width} pixels are too small")
            if row.tap >= 0:
                found[row.tap] = (row.channels, *size)
        if self.window is not None and max(size) > self.window:
            raise WrongSizeError(
                f"images of {height}x{width} pixels are too large: the last map may have a side of "
                f"at most {self.window}, which is what the network pools"
            )
        return [found[tap] for tap in sorted(found)]

    def as_stock(self, maps: list[Tensor], x: Tensor) -> list[Tensor]:
        """The maps [N,C,H,W] of all taps in the layout that stock gives them for images x."""
        if is_nhwc(x):
            return maps
        last = {row.tap: row.is_nhwc for row in self.rows if row.tap >= 0}
        return [y if last[tap] else to_nchw(y) for tap, y in zip(sorted(last), maps, strict=True)]


def weight_of(layer: Layer) -> Tensor:
    """A convolution's weight [Cout,Cin/groups,K,K]."""
    weight = layer.tensors[0]
    assert weight is not None
    return weight


def sizes_of(spec: NetworkSpec) -> Sizes:
    """The sizes of a network that is being packed."""
    last = makes_nhwc([weight_of(spec.stem)])
    rows = [Row(spec.stem.geometry, weight_of(spec.stem).shape[0], spec.stem_tap, last)]
    for block in spec.blocks:
        found = block.layers
        last = last or makes_nhwc(weights_of(found.layers))
        rows.append(Row(found.spatial, weight_of(found.last).shape[0], block.tap, last))
    outputs = weight_of(spec.head).shape[0] if spec.head else 0
    if spec.linear is not None:
        outputs = spec.linear.weight.shape[0]
    return Sizes(weight_of(spec.stem).shape[1], outputs, tuple(rows), spec.window)
