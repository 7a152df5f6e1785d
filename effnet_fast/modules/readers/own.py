"""The readers of this package's own modules, `layers`."""

from __future__ import annotations

from typing import Any

from torch import nn

from effnet_fast.backends.base import PLAIN
from effnet_fast.modules import layers, stock, structure
from effnet_fast.modules.same_padding import Conv2dSame
from effnet_fast.modules.stochastic_depth import StochasticDepth
from effnet_fast.modules.structure import DEPTHWISE, POINTWISE, Part, RefusedError
from effnet_fast.reference.mbconv import SqueezeExciteParams

_MISSING = object()
_CONV_NAMES = ("weight", "bias")
_BN_NAMES = (*_CONV_NAMES, "running_mean", "running_var")
_ACTIVATION, _GATE = (structure.one_of(*k) for k in (structure.ACTIVATIONS, structure.GATES))
_CONV_BN = (
    Part("0", structure.one_of(nn.Conv2d, Conv2dSame)),
    Part("1", structure.one_of(nn.BatchNorm2d)),
)
_LAYER = structure.children_of(_CONV_BN, (*_CONV_BN, Part("2", _ACTIVATION)))
_EXCITE = structure.children_of((
    Part("avgpool", structure.one_of(nn.AdaptiveAvgPool2d)),
    Part("fc1", structure.one_of(nn.Conv2d)), Part("fc2", structure.one_of(nn.Conv2d)),
    Part("activation", _ACTIVATION), Part("scale_activation", _GATE),
))  # fmt: skip

CONV: dict[type, structure.Children | None] = {layers.Conv2dNormActivation: _LAYER}
_SE: dict[type, structure.Children | None] = {layers.SqueezeExcitation: _EXCITE}


def body(*kinds: dict[type, structure.Children | None]) -> list[Part]:
    """Layers in a row, and squeeze-excites."""
    return [Part(str(index), kind) for index, kind in enumerate(kinds)]


# [expand,] depthwise, [squeeze-excite,] project; of three, the second is either.
_BODIES = structure.children_of(
    body(CONV, CONV), body(CONV, CONV | _SE, CONV), body(CONV, CONV, _SE, CONV)
)
_BLOCK = structure.children_of((
    Part("block", {nn.Sequential: _BODIES}),
    Part("stochastic_depth", structure.one_of(StochasticDepth)),
))  # fmt: skip
_RELU6 = (0.0, 6.0)


def behind(place: str, refused: RefusedError) -> str:
    """A reason with its place in front, unless it is about code that any place runs."""
    text = str(refused)
    return f"{place}{text}" if text[:1] in (" ", ".") else text


def _refuse_tensor(name: str) -> RefusedError:
    return RefusedError(f".{name} is no plain tensor")


def _conv_geometry(conv: Any) -> tuple[str, structure.Geometry]:
    """The kind of a convolution, and its geometry."""
    padding = conv.padding
    if conv.dilation != (1, 1) or conv.padding_mode != "zeros" or isinstance(padding, str):
        raise RefusedError(" has dilation, a padding mode or a padding by name")
    kernel, stride = conv.kernel_size, conv.stride
    if not type(kernel) is type(stride) is type(padding) is tuple or min(padding) < 0:
        raise RefusedError(f" has kernel {kernel}, stride {stride} and padding {padding}")
    geometry = structure.Geometry(kernel, stride, None if type(conv) is Conv2dSame else padding)
    if conv.groups == 1:
        is_pointwise = kernel == stride == (1, 1) and padding == (0, 0)
        return POINTWISE if is_pointwise else structure.DENSE, geometry
    if conv.groups != conv.in_channels or conv.groups != conv.out_channels:
        raise RefusedError(" is a grouped convolution")
    if kernel[0] != kernel[1] or kernel[0] % 2 == 0 or stride not in ((1, 1), (2, 2)):
        raise RefusedError(f" has kernel {kernel} and stride {stride}")
    return DEPTHWISE, geometry


# Members are read from the modules' own tables: nn.Module.__getattr__ is slow.
def _conv_members(conv: nn.Module) -> tuple[Any, Any]:
    """Weight and bias of a convolution."""
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
    if not state.keys().isdisjoint(_BN_NAMES):
        raise structure.hidden(state, _BN_NAMES)
    table, buffers = state["_parameters"], state["_buffers"]
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


def _require_as_made(child: Any, name: str) -> None:
    """Raises RefusedError where an activation or a gate computes something else than its name says.

    SiLU and sigmoid need no such call: the code below them is in the tables of layers and blocks.
    """
    stock.ACTIVATIONS[name].require()
    if name == "relu6" and (child.min_val, child.max_val) != _RELU6:
        raise RefusedError(f" clamps to {child.min_val} and {child.max_val}, not to 0 and 6")


def layer(module: nn.Module) -> structure.Layer:
    """Takes a Conv2dNormActivation apart, whose children are what is allowed."""
    children = module.__dict__["_modules"]
    conv, bn = children["0"], children["1"]
    activation, child = "identity", "0"
    try:
        weight, bias = _conv_members(conv)
        if bias is not None:
            raise RefusedError(" has a bias")
        shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
        if weight.shape != shape:
            raise RefusedError(f".weight has shape {list(weight.shape)}, not {list(shape)}")
        child = "1"
        vectors = _bn_members(bn, conv.out_channels)
        child = "0"
        kind, geometry = _conv_geometry(conv)
        if "2" in children:
            child = "2"
            activation = structure.ACTIVATIONS[type(children[child])]
            if activation != "silu":
                _require_as_made(children[child], activation)
    except RefusedError as refused:
        raise RefusedError(behind(f".{child}", refused)) from None
    return structure.Layer(kind, conv, bn, activation, geometry, (weight, *vectors))


def _named_layer(module: nn.Module) -> structure.Layer:
    """A layer that is no part of a block, with the class in front of a reason."""
    try:
        structure.require_children(module.__dict__["_modules"], _LAYER)
        return layer(module)
    except RefusedError as refused:
        raise RefusedError(behind(type(module).__name__, refused)) from None


def _excite(module: nn.Module, channels: int) -> tuple[SqueezeExciteParams, str, str]:
    """Parameters, activation and gate of a SqueezeExcitation with children that are allowed."""
    state = module.__dict__
    children = state["_modules"]
    if not state.keys().isdisjoint(children):
        raise structure.hidden(state, children)
    reduced = children["fc1"].out_channels
    tensors: list[Any] = []
    shapes = {"fc1": (reduced, channels, 1, 1), "fc2": (channels, reduced, 1, 1)}
    key = ""
    try:
        for key, shape in shapes.items():
            conv = children[key]
            tensors += _conv_members(conv)
            weight, bias = tensors[-2:]
            if bias is not None and bias.shape != shape[:1]:
                raise RefusedError(f".bias has shape {list(bias.shape)}, not {list(shape[:1])}")
            if weight.shape != shape or conv.stride != (1, 1) or conv.padding != (0, 0):
                raise RefusedError(f" is not a 1x1 convolution of {channels} channels")
        key = "activation"
        activation = structure.ACTIVATIONS[type(children[key])]
        if activation != "silu":
            _require_as_made(children[key], activation)
        key = "scale_activation"
        gate = structure.GATES[type(children[key])]
        if gate != "sigmoid":
            _require_as_made(children[key], gate)
    except RefusedError as refused:
        raise RefusedError(behind(f".{key}", refused)) from None
    pooled = children["avgpool"].output_size
    if pooled not in (1, (1, 1)):
        raise RefusedError(f".avgpool pools to {pooled}")
    return SqueezeExciteParams(*tensors), activation, gate


def _block(module: layers.MBConv) -> structure.Block:
    """Takes an MBConv apart."""
    state = module.__dict__
    table = state["_modules"]
    own = {"block": table.get("block"), "stochastic_depth": table.get("stochastic_depth")}
    name = ""
    try:
        if not state.keys().isdisjoint(own):
            raise structure.hidden(state, own)
        structure.require_children(own, _BLOCK)
        drop_path, children = own["stochastic_depth"], own["block"].__dict__["_modules"]
        *first, last = children
        third = first.pop() if type(children[first[-1]]) is layers.SqueezeExcitation else None
        second = first.pop()
        expand = None
        for name in first:
            expand = layer(children[name])
        name = second
        depthwise = layer(children[name])
        channels = depthwise.conv.out_channels
        excite, se_activation, gate = None, "silu", "sigmoid"
        if third is not None:
            name = third
            excite, se_activation, gate = _excite(children[name], channels)
        name = last
        project = layer(children[name])
    except RefusedError as refused:
        raise RefusedError(behind(f"block.{name}", refused) if name else str(refused)[1:]) from None
    if expand and (expand.kind != POINTWISE or expand.conv.out_channels != channels):
        raise RefusedError("block.0 is not the pointwise layer before the depthwise one")
    if depthwise.kind != DEPTHWISE or project.kind != POINTWISE or project.activation != "identity":
        raise RefusedError("block is not expand, depthwise, squeeze-excite, project")
    if expand and expand.activation != depthwise.activation:
        kinds = f"{expand.activation} and {depthwise.activation}"
        raise RefusedError(f"block.0 and block.1 have different activations, {kinds}")
    if project.conv.in_channels != channels:
        raise RefusedError(f"block.{last} does not take {channels} channels")
    dtype = project.tensors[0].dtype
    for met in (expand and expand.tensors[0], depthwise.tensors[0], *(excite or ())):
        if met is not None and met.dtype is not dtype:
            raise RefusedError(f"block has weights in {met.dtype} and {dtype}")
    residual = bool(module.use_res_connect)
    geometry, first = depthwise.geometry, (expand or depthwise).conv.in_channels
    if residual and not (
        first == project.conv.out_channels and geometry.stride == (1, 1) and geometry.is_centred
    ):
        raise RefusedError("it adds its input to an output of another shape")
    return structure.Block(
        expand,
        depthwise,
        excite,
        se_activation,
        gate,
        project,
        residual,
        drop_path.p if drop_path.training else 0.0,
        drop_path.mode,
        module.memory,
    )


structure.reads(layers.Conv2dNormActivation, _named_layer, stock.LAYER.require)
structure.reads(layers.MBConv, _block, stock.BLOCK.require)
structure.checks_code(stock.NETWORK.require)
