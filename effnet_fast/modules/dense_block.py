"""What a FusedMBConv consists of: `structure.Block` for blocks without a depthwise convolution."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from effnet_fast.modules.structure import Geometry, Layer


class DenseBlock(NamedTuple):
    """A FusedMBConv: a dense convolution, then a 1x1 projection or nothing."""

    dense: Layer
    project: Layer | None  # without an activation
    residual: bool  # whether its input is added to what drop-path leaves of its body
    drop_probability: float  # of drop-path in the mode that the block is in: 0 outside training
    drop_mode: str  # "row" or "batch", see `stochastic_depth`

    @property
    def first(self) -> Layer:
        """The layer that sees the input."""
        return self.dense

    @property
    def last(self) -> Layer:
        """The layer that gives the output, but for the residual."""
        return self.project or self.dense

    @property
    def spatial(self) -> Geometry:
        """Of the convolution that looks at neighbours."""
        return self.dense.geometry

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Its convolutions in order."""
        return (self.dense, self.project) if self.project else (self.dense,)

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """All tensors that the fused passes read."""
        return tuple(tensor for layer in self.layers for tensor in layer.tensors)
