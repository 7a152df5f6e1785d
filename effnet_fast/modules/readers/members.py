"""What every reader reads: the tensors and settings of a layer's modules, and blocks of layers.

Members are read from the modules' own tables: nn.Module.__getattr__ is slow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effnet_fast.backends.base import PLAIN
from effnet_fast.modules import stock, structure
from effnet_fast.modules.dense_block import DenseBlock
from effnet_fast.modules.same_padding import Conv2dSame
from effnet_fast.modules.structure import DENSE, DEPTHWISE, POINTWISE, RefusedError
from effnet_fast.reference.arguments import Sides
from effnet_fast.reference.mbconv import SqueezeExciteParams

_MISSING = object()
_CONV_NAMES = ("weight", "bias")
_BN_NAMES = (*_CONV_NAMES, "running_mean", "running_var")
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)  # of 4-dimensional images they compute the same
_RELU6 = (0.0, 6.0)
# PyTorch's classes, before a reader enters those of its package, whose code another's is not.
ACTIVATIONS, GATES = tuple(structure.ACTIVATIONS), tuple(structure.GATES)
Names = tuple[str, str, str]  # of a layer's convolution, BatchNorm and activation


def behind(place: str, refused: RefusedError) -> str:
    """A reason with its place in front, unless it is about code that any place runs."""
    text = str(refused)
    return f"{place}{text}" if text[:1] in (" ", ".") else text


def without_dot(read: Callable[..., Any]) -> Callable[..., Any]:
    """The reader of a block that is its layers' parent: its reasons begin with a child's name."""

    def reader(*arguments: Any) -> Any:
        try:
            return read(*arguments)
        except RefusedError as refused:
            raise RefusedError(str(refused).removeprefix(".")) from None

    return reader


def sides(conv: Any) -> Sides:
    """The padding of an nn.Conv2d on each side: its numbers, "valid" or "same"."""
    padding = conv.padding
    if type(padding) is str:
        return _named(conv, padding)
    if type(padding) is not tuple or len(padding) != 2 or min(padding) < 0:
        raise RefusedError(f" has padding {padding}")
    rows, columns = padding
    return columns, columns, rows, rows


def _named(conv: Any, padding: str) -> Sides:
    """PyTorch's "same" gives an even kernel one more zero behind, and takes no other stride."""
    if padding == "valid":
        return 0, 0, 0, 0
    kernel = conv.kernel_size
    if padding != "same" or conv.stride != (1, 1) or conv.dilation != (1, 1):
        raise RefusedError(f" has padding {padding} and stride {conv.stride}")
    if type(kernel) is not tuple or any(size % 2 == 0 for size in kernel):
        raise RefusedError(f" has padding {padding} and kernel {kernel}")
    rows, columns = (size // 2 for size in kernel)
    return columns, columns, rows, rows


def padded(pad: Any, name: str) -> Sides:
    """What an nn.ZeroPad2d or an nn.ConstantPad2d puts around images, which must be zeros."""
    padding, value = pad.padding, pad.value
    is_plain = type(padding) is tuple and [*map(type, padding)] == [int] * 4
    if not is_plain or min(padding) < 0 or type(value) not in (int, float) or value != 0:
        raise RefusedError(f".{name} pads {padding} with {value}")
    left, right, top, bottom = padding
    return left, right, top, bottom


def probability(p: Any, name: str) -> float:
    """A rate of dropping that is one."""
    if type(p) not in (int, float) or not 0 <= p <= 1:
        raise RefusedError(f"{name} is {p}, no probability")
    return float(p)


def same(conv: Any) -> None:
    """TensorFlow's padding, by the size of the images."""


def _same_or_sides(conv: Any) -> Sides | None:
    sides: Any = conv.sides
    if conv.padding != (0, 0):
        raise RefusedError(f" has padding {conv.padding} beside its own")
    if sides is None:
        return None
    if type(sides) is not tuple or len(sides) != 4 or not all(type(n) is int for n in sides):
        raise RefusedError(f" has sides {sides}")
    if min(sides) < 0:
        raise RefusedError(f" has sides {sides}")
    return sides


# How a convolution of exactly this class pads.
PADDINGS: dict[type, Callable[[Any], Sides | None]] = {
    nn.Conv2d: sides,
    Conv2dSame: _same_or_sides,
}
# Classes of convolutions whose stride may be a list, which somebody may edit: it is a constant of
# one call, and who keeps what was read for another has to read it again.
LISTS: set[type] = set()
# Classes of BatchNorms that keep their weight and bias in buffers and never use a batch's numbers.
FROZEN: set[type] = set()


def _geometry(conv: Any, padding: Sides | None) -> tuple[str, structure.Geometry]:
    """The kind of a convolution, and its geometry."""
    if conv.dilation != (1, 1):
        raise RefusedError(f" has dilation {conv.dilation}, which no kernel has")
    if conv.padding_mode != "zeros":
        raise RefusedError(f" has padding mode {conv.padding_mode!r}, which no kernel has")
    kernel, stride = conv.kernel_size, conv.stride
    if type(stride) is list and type(conv) in LISTS and all(type(n) is int for n in stride):
        stride = tuple(stride)
    if not type(kernel) is type(stride) is tuple:
        raise RefusedError(f" has kernel {kernel} and stride {stride}")
    geometry = structure.Geometry(kernel, stride, padding)
    if conv.groups == 1:
        is_pointwise = kernel == stride == (1, 1) and (not padding or not any(padding))
        return POINTWISE if is_pointwise else DENSE, geometry
    if conv.groups != conv.in_channels or conv.groups != conv.out_channels:
        raise RefusedError(" is a grouped convolution")
    if kernel[0] != kernel[1] or kernel[0] % 2 == 0 or stride not in ((1, 1), (2, 2)):
        raise RefusedError(f" has kernel {kernel} and stride {stride}")
    return DEPTHWISE, geometry


def children(module: nn.Module) -> dict[str, Any]:
    """A module's children, none of which an attribute hides."""
    state = module.__dict__
    table: dict[str, Any] = state["_modules"]
    if not state.keys().isdisjoint(table):
        raise structure.hidden(state, table)
    return table


def _refuse_tensor(name: str) -> RefusedError:
    return RefusedError(f".{name} is no plain tensor")


def _conv_members(conv: nn.Module) -> tuple[Any, Any]:
    """Weight and bias of a convolution or of a linear layer."""
    state = conv.__dict__
    if not state.keys().isdisjoint(_CONV_NAMES):
        raise structure.hidden(state, _CONV_NAMES)
    table = state["_parameters"]
    weight, bias = table.get("weight", _MISSING), table.get("bias", _MISSING)
    if type(weight) not in PLAIN:
        raise _refuse_tensor("weight")
    if bias is not None and type(bias) not in PLAIN:
        raise _refuse_tensor("bias")
    return weight, bias


def _bn_members(bn: nn.Module, channels: int) -> tuple[Any, Any, Any, Any]:
    """Weight, bias, mean and variance of a BatchNorm."""
    state = bn.__dict__
    if type(bn) is nn.SyncBatchNorm:
        stock.SYNC_BATCH_NORM.require()
        if "_check_non_zero_input_channels" in state:
            raise RefusedError(" has a patched _check_non_zero_input_channels")
    if not state.keys().isdisjoint(_BN_NAMES):
        raise structure.hidden(state, _BN_NAMES)
    buffers = state["_buffers"]
    table = buffers if type(bn) in FROZEN else state["_parameters"]
    weight, bias = table.get("weight", _MISSING), table.get("bias", _MISSING)
    mean = buffers.get("running_mean", _MISSING)
    var = buffers.get("running_var", _MISSING)
    if (mean is None) != (var is None):
        raise RefusedError(" has one of its two running statistics")
    shape = (channels,)
    for vector in (weight, bias, mean, var):
        if vector is None:
            continue
        if type(vector) not in PLAIN:
            raise RefusedError(" holds a tensor of another type")
        if vector.shape != shape:
            raise RefusedError(f" does not have {channels} channels")
    if mean is not None and (mean.requires_grad or var.requires_grad):
        raise RefusedError(" has a running statistic that requires a gradient")
    eps: Any = bn.eps
    if not eps > 0:
        raise RefusedError(f" has eps {eps}")
    return weight, bias, mean, var


def _require_one_dtype(weight: Tensor, vectors: Sequence[Any]) -> None:
    """Raises RefusedError where a frozen BatchNorm gives another dtype than a plain one.

    It multiplies by its buffers, which makes the wider dtype of the two.
    """
    if torch.is_autocast_enabled(weight.device.type):
        raise RefusedError(" gives the dtype of its buffers under autocast")
    for vector in vectors:
        if vector is None or vector.dtype is not weight.dtype:
            raise RefusedError(f" has other buffers than of {weight.dtype}")


def _require_as_made(child: Any, name: str) -> None:
    """Raises RefusedError where an activation or a gate computes something else than its name says.

    SiLU and sigmoid need no such call: the code below them is in the tables of layers and blocks.
    """
    stock.ACTIVATIONS[name].require()
    if name == "relu6" and (child.min_val, child.max_val) != _RELU6:
        raise RefusedError(f" clamps to {child.min_val} and {child.max_val}, not to 0 and 6")


def layer(
    conv: Any,
    bn: Any,
    activation: Any,
    names: Names,
    pad: Sides | None = None,
) -> structure.Layer:
    """A convolution, its BatchNorm and an activation or None, whose classes are known.

    Args:
        names: of the three, for reasons.
        pad: the padding by a module before the convolution, which itself must have none.
    """
    kind, name = "identity", names[0]
    try:
        weight, bias = _conv_members(conv)
        if bias is not None:
            raise RefusedError(" has a bias")
        shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
        if weight.shape != shape:
            raise RefusedError(f".weight has shape {list(weight.shape)}, not {list(shape)}")
        name = names[1]
        vectors = _bn_members(bn, conv.out_channels)
        if type(bn) in FROZEN:
            _require_one_dtype(weight, vectors)
            bn = structure.FrozenNorm(bn.eps)
        name = names[0]
        padding = PADDINGS[type(conv)](conv)
        if pad is not None:
            if padding is None or any(padding):
                raise RefusedError(" pads after a module that pads")
            padding = pad
        form, geometry = _geometry(conv, padding)
        if activation is not None:
            name = names[2]
            kind = structure.ACTIVATIONS[type(activation)]
            if kind != "silu":
                _require_as_made(activation, kind)
    except RefusedError as refused:
        raise RefusedError(behind(f".{name}", refused)) from None
    return structure.Layer(form, conv, bn, kind, geometry, (weight, *vectors))


def require_pooled(pool: Any, name: str) -> None:
    """Raises RefusedError for an nn.AdaptiveAvgPool2d that gives more than one number."""
    if pool.output_size not in (1, (1, 1)):
        raise RefusedError(f".{name} pools to {pool.output_size}")


def _as_convolution(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A linear layer's weight [out,in] as a 1x1 convolution's [out,in,1,1].

    Its gradient reaches the layer's even where a call without gradients reads it for another with:
    checkpointing runs a block a second time by what was read for the first.
    """
    if weight.shape != shape[:2]:
        raise RefusedError(f".weight has shape {list(weight.shape)}, not {list(shape[:2])}")
    with torch.enable_grad():
        return weight[:, :, None, None]


def _pointwise(conv: Any, shape: tuple[int, ...], channels: int) -> tuple[Any, Any]:
    """Weight and bias of one of squeeze-excite's layers; `channels` are those of its images."""
    weight, bias = _conv_members(conv)
    if bias is not None and bias.shape != shape[:1]:
        raise RefusedError(f".bias has shape {list(bias.shape)}, not {list(shape[:1])}")
    if type(conv) is nn.Linear:
        return _as_convolution(weight, shape), bias
    padding = PADDINGS[type(conv)](conv)
    if weight.shape != shape or tuple(conv.stride) != (1, 1) or (padding and any(padding)):
        raise RefusedError(f" is not a 1x1 convolution of {channels} channels")
    return weight, bias


def excite(parts: Sequence[Any], names: Sequence[str], channels: int) -> structure.Excite:
    """Squeeze-excite's two layers and their activations, whose classes are known.

    Args:
        parts: reduce, activation, expand and gate, which is None for a sigmoid that is no module.
        names: of these, for reasons.
    """
    reduce, activation, expand, gate = parts
    reduced = reduce.out_features if type(reduce) is nn.Linear else reduce.out_channels
    tensors: list[Any] = []
    name, se_gate = names[0], "sigmoid"
    try:
        name = names[0]
        tensors += _pointwise(reduce, (reduced, channels, 1, 1), channels)
        name = names[2]
        tensors += _pointwise(expand, (channels, reduced, 1, 1), channels)
        name = names[1]
        se_activation = structure.ACTIVATIONS[type(activation)]
        if se_activation != "silu":
            _require_as_made(activation, se_activation)
        name = names[3]
        if gate is not None:
            se_gate = structure.GATES[type(gate)]
            if se_gate != "sigmoid":
                _require_as_made(gate, se_gate)
    except RefusedError as refused:
        raise RefusedError(behind(f".{name}", refused)) from None
    return structure.Excite(SqueezeExciteParams(*tensors), se_activation, se_gate)


def block(
    expand: structure.Layer | None,
    depthwise: structure.Layer,
    excited: structure.Excite | None,
    project: structure.Layer,
    skip: structure.Skip,
    names: Names,
    memory: str,
) -> structure.Block:
    """An MBConv of layers that fit together.

    Args:
        names: of expand, depthwise and project, for reasons.
    """
    channels = depthwise.conv.out_channels
    if expand and (expand.kind != POINTWISE or expand.conv.out_channels != channels):
        raise RefusedError(f"{names[0]} is not the pointwise layer before the depthwise one")
    if depthwise.kind != DEPTHWISE or project.kind != POINTWISE or project.activation != "identity":
        raise RefusedError("block is not expand, depthwise, squeeze-excite, project")
    if expand and expand.activation != depthwise.activation:
        kinds = f"{expand.activation} and {depthwise.activation}"
        raise RefusedError(f"{names[0]} and {names[1]} have different activations, {kinds}")
    if project.conv.in_channels != channels:
        raise RefusedError(f"{names[2]} does not take {channels} channels")
    params, se_activation, gate = excited or (None, "silu", "sigmoid")
    dtype = project.tensors[0].dtype
    weights: tuple[Tensor | None, ...] = (expand and expand.tensors[0], depthwise.tensors[0])
    for met in (*weights, *(params or ())):
        if met is not None and met.dtype is not dtype:
            raise RefusedError(f"block has weights in {met.dtype} and {dtype}")
    _require_shape(skip, depthwise.geometry, (expand or depthwise).conv, project.conv)
    return structure.Block(
        expand, depthwise, params, se_activation, gate, project, *skip[:3], memory, skip.promotes
    )


def dense_block(
    dense: structure.Layer,
    project: structure.Layer | None,
    skip: structure.Skip,
    names: tuple[str, str],
    memory: str,
) -> DenseBlock:
    """A FusedMBConv of layers that fit together.

    Args:
        names: of dense and project, for reasons.
    """
    if dense.kind != DENSE or not dense.activates:
        raise RefusedError(f"{names[0]} is no dense convolution with an activation")
    if dense.geometry.kernel[0] != dense.geometry.kernel[1]:
        raise RefusedError(f"{names[0]} has kernel {dense.geometry.kernel}")
    if dense.geometry.stride not in ((1, 1), (2, 2)):
        raise RefusedError(f"{names[0]} has stride {dense.geometry.stride}")
    if project and (project.kind != POINTWISE or project.activates):
        raise RefusedError(f"{names[1]} is no pointwise layer without an activation")
    if project and project.conv.in_channels != dense.conv.out_channels:
        raise RefusedError(f"{names[1]} does not take {dense.conv.out_channels} channels")
    if project and project.tensors[0].dtype is not dense.tensors[0].dtype:
        dtypes = f"{dense.tensors[0].dtype} and {project.tensors[0].dtype}"
        raise RefusedError(f"block has weights in {dtypes}")
    _require_shape(skip, dense.geometry, dense.conv, (project or dense).conv)
    return DenseBlock(dense, project, *skip[:3], memory, skip.promotes)


def _require_shape(
    skip: structure.Skip, spatial: structure.Geometry, first: Any, last: Any
) -> None:
    """Raises RefusedError where a residual would be added to an output of another shape."""
    if skip.residual and not (
        first.in_channels == last.out_channels and spatial.stride == (1, 1) and spatial.is_centred
    ):
        raise RefusedError("it adds its input to an output of another shape")
