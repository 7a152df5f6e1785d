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
_CONV_BN = Part("0", (nn.Conv2d, Conv2dSame)), Part("1", (nn.BatchNorm2d,))
_LAYER = structure.children_of(_CONV_BN, (*_CONV_BN, Part("2", (nn.SiLU,))))
_EXCITE = structure.children_of((
    Part("avgpool", (nn.AdaptiveAvgPool2d,)), Part("fc1", (nn.Conv2d,)), Part("fc2", (nn.Conv2d,)),
    Part("activation", (nn.SiLU,)), Part("scale_activation", (nn.Sigmoid,)),
))  # fmt: skip


def _body(*kinds: type) -> list[Part]:
    """Layers in a row, and squeeze-excites."""
    below = {layers.Conv2dNormActivation: _LAYER, layers.SqueezeExcitation: _EXCITE}
    return [Part(str(index), (kind,), below[kind]) for index, kind in enumerate(kinds)]


_CONV, _SE = layers.Conv2dNormActivation, layers.SqueezeExcitation
_BODIES = structure.children_of(_body(_CONV, _SE, _CONV), _body(_CONV, _CONV, _SE, _CONV))
_BLOCK = structure.children_of(
    (Part("block", (nn.Sequential,), _BODIES), Part("stochastic_depth", (StochasticDepth,)))
)


def _refuse_tensor(name: str) -> RefusedError:
    return RefusedError(f".{name} is no plain tensor")


def _conv_geometry(conv: Any) -> tuple[str, structure.Geometry]:
    """The kind of a convolution, and its geometry."""
    padding = conv.padding
    if conv.dilation != (1, 1) or conv.padding_mode != "zeros" or isinstance(padding, str):
        raise RefusedError(" has dilation, a padding mode or a padding by name")
    kernel, stride = conv.kernel_size, conv.stride
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
    return weight, bias, mean, var


def _layer(module: nn.Module) -> structure.Layer:
    """Takes a Conv2dNormActivation apart, whose children are what is allowed."""
    children = module.__dict__["_modules"]
    conv, bn, silu = children["0"], children["1"], "2" in children
    child = "0"
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
    except RefusedError as refused:
        raise RefusedError(f".{child}{refused}") from None
    if kind != POINTWISE and not silu:
        raise RefusedError(" has no activation")
    return structure.Layer(kind, conv, bn, silu, geometry, (weight, *vectors))


def _named_layer(module: nn.Module) -> structure.Layer:
    """A layer that is no part of a block, with the class in front of a reason."""
    try:
        structure.require_children(module.__dict__["_modules"], _LAYER)
        return _layer(module)
    except RefusedError as refused:
        raise RefusedError(f"{type(module).__name__}{refused}") from None


def _excite(module: nn.Module, channels: int) -> SqueezeExciteParams:
    """Takes a SqueezeExcitation apart, whose children are what is allowed."""
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
    except RefusedError as refused:
        raise RefusedError(f".{key}{refused}") from None
    pooled = children["avgpool"].output_size
    if pooled not in (1, (1, 1)):
        raise RefusedError(f".avgpool pools to {pooled}")
    return SqueezeExciteParams(*tensors)


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
        *first, second, third, last = children
        expand = None
        for name in first:
            expand = _layer(children[name])
        name = second
        depthwise = _layer(children[name])
        channels = depthwise.conv.out_channels
        name = third
        excite = _excite(children[name], channels)
        name = last
        project = _layer(children[name])
    except RefusedError as refused:
        place = f"block.{name}{refused}" if name else str(refused)[1:]
        raise RefusedError(place) from None
    if expand and (expand.kind != POINTWISE or expand.conv.out_channels != channels):
        raise RefusedError("block.0 is not the pointwise layer before the depthwise one")
    if expand and not expand.silu:
        raise RefusedError("block.0 has no activation")
    if depthwise.kind != DEPTHWISE or project.kind != POINTWISE or project.silu:
        raise RefusedError("block is not expand, depthwise, squeeze-excite, project")
    if project.conv.in_channels != channels:
        raise RefusedError(f"block.{last} does not take {channels} channels")
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
        project,
        residual,
        drop_path.p if drop_path.training else 0.0,
        drop_path.mode,
        module.memory,
    )


structure.reads(layers.Conv2dNormActivation, _named_layer, stock.LAYER.require)
structure.reads(layers.MBConv, _block, stock.BLOCK.require)
structure.checks_code(stock.NETWORK.require)
