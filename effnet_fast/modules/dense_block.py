"""What a FusedMBConv consists of: `structure.Block` for blocks without a depthwise convolution."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from effnet_fast.backends import OpArgs, backend_of
from effnet_fast.modules.structure import Block, Geometry, Layer, norms_of
from effnet_fast.ops.call import Call, call_of


class DenseBlock(NamedTuple):
    """A FusedMBConv: a dense convolution, then a 1x1 projection or nothing."""

    dense: Layer
    project: Layer | None  # without an activation
    residual: bool  # the first three of `structure.Skip`
    drop_probability: float
    drop_mode: str
    memory: str  # "fast", or "lean" to save one expanded tensor less for backward
    promotes: bool = False  # the last of `Skip`

    @property
    def op(self) -> str:
        """The op whose passes compute it."""
        return "mbconv"

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

    def op_args(self, x: Tensor, inference: bool) -> OpArgs | None:
        """As `Layer.op_args`; PyTorch's own convolution takes any kernel."""
        if x.shape[1] != self.dense.conv.in_channels:
            return None
        return OpArgs(x, self.parameters, (1, 1), 1, inference, (self.dense.activation,), None)

    def begin_call(self, x: Tensor, backend: str) -> Call:
        """As `Layer.begin_call`."""
        norms, geometry = norms_of(self.layers), self.spatial
        return call_of(
            norms, (x, *self.parameters), backend, geometry.stride,
            geometry.sides(x.shape[2], x.shape[3]), self.residual, self.memory,
            self.dense.activation,
        )  # fmt: skip


Found = Layer | Block | DenseBlock  # what a module may be


def obstacle(backend: str) -> str | None:
    """Why a resolved backend leaves a DenseBlock to its layers; None where it runs it as one."""
    if backend_of(backend).launches("norm_statistics"):
        return None
    return f"the {backend} backend has no kernel for it as one block: its layers run by themselves"
