"""The reader of MONAI's two-dimensional EfficientNet blocks.

They are efficientnet_pytorch's, padded by modules of their own. The children of a block without
expansion are identities that forward does not call.

Source: monai/networks/nets/efficientnet.py of MONAI 1.6, https://github.com/Project-MONAI/MONAI.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from effnet_fast.modules import stock, structure
from effnet_fast.modules.foreign import RECIPES, Finder, Fused, Recipe
from effnet_fast.modules.foreign_code import find
from effnet_fast.modules.readers import members
from effnet_fast.modules.stochastic_depth import UNIFORM
from effnet_fast.modules.structure import Part, RefusedError

_BLOCK = "monai.networks.nets.efficientnet:MBConvBlock"
_SWISH = "monai.networks.blocks.activation:Swish"
_LEAN_SWISH = "monai.networks.blocks.activation:MemoryEfficientSwish"
_EXPAND = "_expand_conv", "_expand_conv_padding", "_bn0"
_DEPTHWISE = "_depthwise_conv", "_depthwise_conv_padding", "_bn1"
_SE = "_se_adaptpool", "_se_reduce", "_se_reduce_padding", "_se_expand", "_se_expand_padding"
_PROJECT = "_project_conv", "_project_conv_padding", "_bn2"
_RESIDUAL = "id_skip stride in_channels out_channels drop_connect_rate"  # what decides about it
_SE_NAMES = "_se_reduce", "_swish", "_se_expand", "sigmoid"


def _children(find: Finder) -> dict[tuple[bool, bool], structure.Children]:
    """The children of a block, by whether it expands and whether it has a squeeze-excite."""
    swish, lean_swish = find(_SWISH), find(_LEAN_SWISH)
    structure.ACTIVATIONS[swish] = structure.ACTIVATIONS[lean_swish] = "silu"
    identity, conv = structure.one_of(nn.Identity), structure.one_of(nn.Conv2d)
    pad, norm = identity | structure.one_of(nn.ConstantPad2d), structure.one_of(*members.NORMS)
    activation = structure.one_of(*members.ACTIVATIONS, swish, lean_swish)
    layer = conv, pad, norm
    excite = structure.one_of(nn.AdaptiveAvgPool2d), conv, identity, conv, identity

    def row(expands: bool, excites: bool) -> structure.Children:
        kinds = (
            *zip(_EXPAND, layer if expands else (identity,) * 3, strict=True),
            *zip(_DEPTHWISE, layer, strict=True),
            *(zip(_SE, excite, strict=True) if excites else ()),
            *zip(_PROJECT, layer, strict=True),
            ("_swish", activation),
        )
        return structure.children_of([Part(*part) for part in kinds])

    return {(a, b): row(a, b) for a in (False, True) for b in (False, True)}


def _layer(children: dict[str, Any], names: members.Names, activation: Any) -> structure.Layer:
    """A layer of these names: convolution, what pads before it, and BatchNorm."""
    conv, pad, bn = names
    before = children[pad]
    sides = None if type(before) is nn.Identity else members.padded(before, pad)
    return members.layer(children[conv], children[bn], activation, (conv, bn, "_swish"), sides)


def _excite(children: dict[str, Any], channels: int) -> structure.Excite:
    members.require_pooled(children["_se_adaptpool"], "_se_adaptpool")
    parts = children["_se_reduce"], children["_swish"], children["_se_expand"], None
    return members.excite(parts, _SE_NAMES, channels)


def _skip(module: Any) -> structure.Skip:
    if not (module.id_skip and module.stride == 1 and module.in_channels == module.out_channels):
        return structure.Skip(False, 0.0, UNIFORM, False)
    rate = module.drop_connect_rate
    if rate is None:
        return structure.Skip(True, 0.0, UNIFORM, True)
    p = members.probability(rate, ".drop_connect_rate")
    if p == 1:
        raise RefusedError(f".drop_connect_rate is {rate}, which divides by 0")
    return structure.Skip(True, p if module.training else 0.0, UNIFORM, True)


def _require_swish(activation: Any) -> None:
    """Raises RefusedError for a Swish that scales, and so for one that learns to."""
    alpha = activation.alpha
    if type(alpha) not in (int, float) or alpha != 1:
        raise RefusedError(f"._swish has alpha {alpha}")


def _block(find: Finder) -> Callable[[Any], structure.Block]:
    allowed, scaling = _children(find), find(_SWISH)

    def read(module: Any) -> structure.Block:
        try:
            children = members.children(module)
            expands, excites = module.expand_ratio != 1, bool(module.has_se)
            structure.require_children(children, allowed[bool(expands), excites])
            swish = children["_swish"]
            if type(swish) is scaling:
                _require_swish(swish)
            expand = _layer(children, _EXPAND, swish) if expands else None
            depthwise = _layer(children, _DEPTHWISE, swish)
            excited = _excite(children, depthwise.conv.out_channels) if excites else None
            project = _layer(children, _PROJECT, None)
            skip = _skip(module)
        except RefusedError as refused:
            raise RefusedError(str(refused).removeprefix(".")) from None
        names = _EXPAND[0], _DEPTHWISE[0], _PROJECT[0]
        return members.block(expand, depthwise, excited, project, skip, names, find.memory)

    return read


@functools.cache
def _layer_children(names: members.Names) -> structure.Children:
    kinds = _children(Finder("auto", "fast"))[True, False]
    (row,) = kinds.values()
    met = {part.name: part.kinds for part in row}
    conv, pad, bn = (met[name] for name in _DEPTHWISE)
    given = zip((*names, "_swish"), (conv, pad, bn, met["_swish"]), strict=True)
    return structure.children_of([Part(*part) for part in given])


def layer_of(children: dict[str, Any], names: members.Names) -> structure.Layer:
    """A network's convolution, what pads before it, and BatchNorm, by their names, and `_swish`.

    Raises:
        RefusedError: they are not what the network's class makes, with the reason.
    """
    structure.require_children(children, _layer_children(names))
    swish = children["_swish"]
    if type(swish) is find(_SWISH):
        _require_swish(swish)
    return _layer(children, names, swish)


RECIPES[_BLOCK] = Recipe(
    (f"{_BLOCK}.forward", f"{_SWISH}.forward", f"{_LEAN_SWISH}.forward"),
    _block,
    Fused,
    below=(stock.BLOCK, stock.PAD, stock.IDENTITY, stock.Stock((torch.Tensor, "__radd__"))),
    members=((_BLOCK, " ".join((*_EXPAND, *_DEPTHWISE, *_SE, *_PROJECT, "_swish"))),),
    settings=((_BLOCK, f"training expand_ratio has_se {_RESIDUAL}"), (_SWISH, "alpha")),
)
