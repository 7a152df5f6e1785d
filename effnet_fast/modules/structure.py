"""What a module consists of, if it is exactly what the fused ops can stand in for.

The children are read at each call. Whatever is not recognised - a hook, a replaced or parametrised
layer, a patched forward - is refused with the reason. Which class is read how stands in a table
that `readers` fills.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effnet_fast.backends import OpArgs
from effnet_fast.modules.requirements import METHODS as METHODS
from effnet_fast.modules.requirements import Children as Children
from effnet_fast.modules.requirements import Kinds as Kinds
from effnet_fast.modules.requirements import Part as Part
from effnet_fast.modules.requirements import RefusedError as RefusedError
from effnet_fast.modules.requirements import children_of as children_of
from effnet_fast.modules.requirements import hidden as hidden
from effnet_fast.modules.requirements import is_altered as is_altered
from effnet_fast.modules.requirements import is_observed as is_observed
from effnet_fast.modules.requirements import one_of as one_of
from effnet_fast.modules.requirements import patched_method as patched_method
from effnet_fast.modules.requirements import refuse_global_hooks as refuse_global_hooks
from effnet_fast.modules.requirements import require as require
from effnet_fast.modules.requirements import require_children as require_children
from effnet_fast.modules.same_padding import same_padding
from effnet_fast.modules.sync_batch_norm import group_of
from effnet_fast.ops.call import NO_NORM, Call, Norm, call_of
from effnet_fast.ops.exchange import Exchange
from effnet_fast.reference.arguments import Sides
from effnet_fast.reference.mbconv import SqueezeExciteParams

DENSE, DEPTHWISE, POINTWISE = "dense", "depthwise", "pointwise"
# The op that a layer of each kind is.
OPS = {
    DENSE: "stem_conv_bn_silu",
    DEPTHWISE: "dwconv_bn_silu",
    POINTWISE: "pointwise_bn_act",
}


class Geometry(NamedTuple):
    """Of a convolution: (height, width) of kernel and stride, and its padding."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: Sides | None  # (left, right, top, bottom); None for TensorFlow's SAME

    def sides(self, height: int, width: int) -> Sides:
        """(left, right, top, bottom) padding of an image, in pixels."""
        if self.padding is not None:
            return self.padding
        top, bottom = same_padding(height, self.kernel[0], self.stride[0])
        left, right = same_padding(width, self.kernel[1], self.stride[1])
        return left, right, top, bottom

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output; below 1 where the image is smaller than the kernel."""
        left, right, top, bottom = self.sides(height, width)
        return (
            (height + top + bottom - self.kernel[0]) // self.stride[0] + 1,
            (width + left + right - self.kernel[1]) // self.stride[1] + 1,
        )

    @property
    def is_regular(self) -> bool:
        """Whether it pads some size of image as SAME does, as (K-1)//2 on both sides does too."""
        if self.padding is None:
            return True
        left, right, top, bottom = self.padding
        sides = (top, bottom), (left, right)
        return all(
            before + after in (k - 1, k - s) and before == (before + after) // 2
            for (before, after), k, s in zip(sides, self.kernel, self.stride, strict=True)
        )

    @property
    def is_centred(self) -> bool:
        """Whether at stride 1 the output is as large as the image."""
        if self.padding is None:
            return True
        left, right, top, bottom = self.padding
        return (top + bottom, left + right) == (self.kernel[0] - 1, self.kernel[1] - 1)


class FrozenNorm(NamedTuple):
    """What a BatchNorm of buffers alone has beside them: it normalises by them in either mode."""

    eps: float
    training: bool = False
    track_running_stats: bool = False
    momentum: float | None = None
    num_batches_tracked: Tensor | None = None


class Layer(NamedTuple):
    """A convolution with its BatchNorm, and the activation behind it.

    activation: see `reference.activations`; "identity" where there is none.
    tensors: weight [Cout,Cin/groups,K,K], and the BatchNorm's weight, bias, mean and variance.
    """

    kind: str
    conv: nn.Conv2d
    bn: nn.BatchNorm2d | nn.SyncBatchNorm | FrozenNorm
    activation: str
    geometry: Geometry
    tensors: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

    @property
    def op(self) -> str:
        """The op that computes it."""
        return OPS[self.kind]

    @property
    def activates(self) -> bool:
        """Whether an activation follows."""
        return self.activation != "identity"

    @property
    def by_batch(self) -> bool:
        """Whether its BatchNorm normalises by the batch's statistics."""
        return self.bn.training or self.tensors[3] is None

    @property
    def syncs(self) -> bool:
        """Whether its BatchNorm normalises by the batches of several processes."""
        return type(self.bn) is nn.SyncBatchNorm and group_of(self.bn) is not None

    @property
    def first(self) -> Layer:
        """The layer that sees the input."""
        return self

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Itself, as of a block that has several."""
        return (self,)

    def op_args(self, x: Tensor, inference: bool) -> OpArgs | None:
        """The call of its op on x [N,C,H,W] that a backend has to run; None for another C."""
        if x.shape[1] != self.conv.in_channels:
            return None
        # Every 1x1 kernel can do without an activation.
        activations = (self.activation,) if self.activates or self.kind != POINTWISE else ()
        if self.kind != DEPTHWISE:  # PyTorch's own convolution takes any kernel
            return OpArgs(x, self.tensors, (1, 1), 1, inference, activations)
        geometry = self.geometry
        return OpArgs(x, self.tensors, geometry.kernel, geometry.stride[0], inference, activations)

    def begin_call(self, x: Tensor, backend: str) -> Call:
        """How its op runs on x, with the BatchNorms' own bookkeeping of one more batch."""
        geometry, tensors = self.geometry, (x, *self.tensors)
        place = geometry.stride, geometry.sides(x.shape[2], x.shape[3])
        return call_of(norms_of((self,)), tensors, backend, *place, activation=self.activation)


class Excite(NamedTuple):
    """A squeeze-and-excite."""

    params: SqueezeExciteParams | None
    activation: str  # of its first layer
    gate: str  # of its second


class Skip(NamedTuple):
    """How a block's input reaches its output past the body."""

    residual: bool  # whether it is added to what drop-path leaves of the body
    drop_probability: float  # of drop-path in the mode that the block is in: 0 outside training
    drop_mode: str  # a key of `stochastic_depth.MODES`
    promotes: bool  # whether the sum has the wider dtype of the two, the body's if not


class Block(NamedTuple):
    """An MBConv."""

    expand: Layer | None  # in this order; expand and excite may be absent
    depthwise: Layer  # with the activation of expand
    excite: SqueezeExciteParams | None
    se_activation: str  # of excite's first layer
    gate: str  # likewise, of its second
    project: Layer
    residual: bool  # the first three of `Skip`
    drop_probability: float
    drop_mode: str
    memory: str  # "fast", or "lean" to save one expanded tensor less for backward
    promotes: bool = False  # the last of `Skip`

    @property
    def op(self) -> str:
        """The op that computes it."""
        return "mbconv"

    @property
    def first(self) -> Layer:
        """The layer that sees the input."""
        return self.expand or self.depthwise

    @property
    def last(self) -> Layer:
        """The layer that gives the output, but for the residual."""
        return self.project

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Its convolutions in order, those of squeeze-and-excitation left out."""
        rest = self.depthwise, self.project
        return (self.expand, *rest) if self.expand else rest

    @property
    def spatial(self) -> Geometry:
        """Of the convolution that looks at neighbours."""
        return self.depthwise.geometry

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """All tensors that the fused op reads."""
        expand = self.expand.tensors if self.expand else ()
        excite = self.excite or ()
        return (*expand, *self.depthwise.tensors, *excite, *self.project.tensors)

    @property
    def activation(self) -> str:
        """That of its convolutions."""
        return self.depthwise.activation

    def op_args(self, x: Tensor, inference: bool) -> OpArgs | None:
        """As `Layer.op_args`."""
        if x.shape[1] != self.first.conv.in_channels:
            return None
        geometry, activation = self.depthwise.geometry, self.depthwise.activation
        call = x, self.parameters, geometry.kernel, geometry.stride[0], inference
        if self.excite is None:
            return OpArgs(*call, (activation,), None)
        return OpArgs(*call, (activation, self.se_activation), self.gate)

    def begin_call(self, x: Tensor, backend: str) -> Call:
        """As `Layer.begin_call`."""
        *first, depthwise, project = norms_of(self.layers)
        norms = first[0] if first else NO_NORM, depthwise, project
        geometry, activation = self.depthwise.geometry, self.depthwise.activation
        place = geometry.stride, geometry.sides(x.shape[2], x.shape[3])
        return call_of(
            norms, (x, *self.parameters), backend, *place, self.residual, self.memory,
            activation, self.se_activation, self.gate,
        )  # fmt: skip


def weights_of(layers: Iterable[Layer]) -> list[Tensor]:
    """The weights [Cout,Cin/groups,K,K] of convolutions."""
    return [layer.tensors[0] for layer in layers]


def norms_of(layers: Sequence[Layer]) -> tuple[Norm, ...]:
    """How the layers' BatchNorms normalise; counts one more batch, as their own forwards do."""
    norms, counters = [], []
    for layer in layers:
        bn = layer.bn
        momentum, is_moving = bn.momentum, bn.training and bn.track_running_stats
        if is_moving and (counter := bn.num_batches_tracked) is not None:
            if momentum is None:
                counter.add_(1)
                momentum = 1.0 / float(counter)
            else:
                counters.append(counter)
        exchange = None
        if type(bn) is nn.SyncBatchNorm and (group := group_of(bn)) is not None:
            exchange = Exchange(group)
        norms.append(Norm(layer.by_batch, momentum or 0.0, bn.eps, is_moving, exchange))
    if counters:  # at once: a call each takes two microseconds
        torch._foreach_add_(counters, 1)
    return tuple(norms)


# The classes of activations and gates by the names in `reference.activations`: what an instance of
# exactly this class computes, as it was made.
ACTIVATIONS: dict[type, str] = {
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.Identity: "identity",
}
GATES: dict[type, str] = {nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hardsigmoid"}


# What of a module's attributes its output depends on, beside children, parameters and buffers.
SETTINGS: dict[type, tuple[str, ...]] = {}
SEQUENCES: set[type] = set()  # classes that call their children in turn, and do no more
_blocks: set[type] = set()
_FSDP = "torch.distributed.fsdp"  # importing it takes a second


def is_block(kind: type) -> bool:
    """Whether instances of a class are read as a block, not as a layer."""
    return kind in _blocks


# How a module of exactly this class is read, and what requires the code below it to be stock's.
_READERS: dict[type, tuple[Callable[..., Any], Callable[[], None]]] = {}


def reads(
    kind: type,
    reader: Callable[..., Any],
    require_stock: Callable[[], None],
    *,
    is_block: bool = True,
) -> None:
    """Enters the reader of a class, and what is called before it.

    The reader takes the module and what its forward takes beside images. Both raise RefusedError:
    for what the reader does not know, and where code that the module's stock forward would run has
    been replaced.
    """
    _READERS[kind] = reader, require_stock
    if is_block:
        _blocks.add(kind)


_code_checks: list[Callable[[], None]] = []


def checks_code(require_stock: Callable[[], None]) -> None:
    """Enters what raises RefusedError where code below a network has been replaced."""
    _code_checks.append(require_stock)


def refuse_replaced_code() -> None:
    """Raises RefusedError where code that a network's modules run has been replaced."""
    for require_stock in _code_checks:
        require_stock()


def has_reader(kind: type) -> bool:
    """Whether instances of exactly this class can be read."""
    return kind in _READERS


def unsharded(kind: type) -> type | None:
    """The class below one that FSDP2's fully_shard made, which leaves forward as it is."""
    bases = kind.__mro__[1:3]
    is_made = bases[0].__module__.startswith(_FSDP) and bases[0].__name__ == "FSDPModule"
    return bases[1] if is_made and "forward" not in vars(kind) | vars(bases[0]) else None


# What raises RefusedError where the code of an activation or a gate of this name is replaced.
activation_checks: dict[str, Callable[[], None]] = {}


def reader_of(module: nn.Module) -> Callable[..., Any]:
    """The reader of a module whose code is stock's, and that no hook of all modules sees.

    Raises:
        RefusedError: there is none, with the reason.
    """
    refuse_global_hooks()
    found = _READERS.get(type(module))
    if found is None and (kind := unsharded(type(module))) is not None:
        found = _READERS.get(kind)
    if found is None:
        raise RefusedError(f"{type(module).__name__} is none of the classes that can be fused")
    if "forward_stock" in module.__dict__:  # its other methods have been passed by now
        raise RefusedError(f"{type(module).__name__} has a patched forward_stock")
    reader, require_stock = found
    require_stock()
    return reader


def structure_of(module: nn.Module, *arguments: Any) -> Any:
    """The module's fused form, a `dense_block.Found`.

    Args:
        arguments: what its forward takes beside the images.

    Raises:
        RefusedError: it has none, with the reason.
    """
    return reader_of(module)(module, *arguments)
