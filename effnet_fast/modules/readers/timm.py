"""The readers of timm's blocks: EfficientNet of every prefix, MobileNetV3 and MnasNet.

timm's BatchNormAct2d is a BatchNorm with drop and activation behind it. A block's children are the
convolutions and norms themselves; `conv_pw` and `bn2` are the projection of a depthwise separable
block, and expansion and depthwise norm of an inverted residual.

Source: timm/models/_efficientnet_blocks.py of timm 0.9.0 to 1.0.31. Until 1.0.3 a block has no `aa`
and no `conv_s2d`; nothing else that forward runs has changed.
https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from effnet_fast.modules import stock, structure
from effnet_fast.modules.foreign import RECIPES, Finder, Recipe, own_class
from effnet_fast.modules.foreign_code import path_of
from effnet_fast.modules.readers import members
from effnet_fast.modules.readers.own import CONVOLUTION
from effnet_fast.modules.stochastic_depth import ROW
from effnet_fast.modules.structure import Part, RefusedError

_BLOCKS = "timm.models._efficientnet_blocks"
_NORM = "timm.layers.norm_act:BatchNormAct2d"
_SAME = "timm.layers.conv2d_same:Conv2dSame"
_DROP = "timm.layers.drop:DropPath"
_SWISH, _SIGMOID = "timm.layers.activations:Swish", "timm.layers.activations:Sigmoid"
_SE = f"{_BLOCKS}:SqueezeExcite"
_SE_NAMES = "conv_reduce", "act1", "conv_expand", "gate"


class _Classes(NamedTuple):
    """What the children of a block may be."""

    conv: structure.Kinds
    norm: structure.Kinds
    se: structure.Kinds
    drop_path: structure.Kinds


def _classes(find: Finder) -> _Classes:
    same, norm, se = find(_SAME), find(_NORM), find(_SE)
    swish, sigmoid = find(_SWISH), find(_SIGMOID)
    members.PADDINGS[same] = members.same
    structure.ACTIVATIONS[swish] = "silu"
    structure.GATES[sigmoid] = "sigmoid"
    activation = structure.one_of(*members.ACTIVATIONS, swish)
    gate = structure.one_of(*members.GATES, sigmoid)
    conv = structure.one_of(nn.Conv2d, same)
    identity = structure.one_of(nn.Identity)
    parts = zip(_SE_NAMES, (conv, activation, conv, gate), strict=True)
    return _Classes(
        conv,
        {norm: structure.children_of((Part("drop", identity), Part("act", activation)))},
        identity | {se: structure.children_of(Part(*part) for part in parts)},
        identity | structure.one_of(find(_DROP)),
    )


def _children(classes: _Classes, *names: str) -> structure.Children:
    """A block's children of these names, whose beginnings tell what they are, and `aa` or not."""
    kinds = classes._asdict() | {"bn": classes.norm, "aa": structure.one_of(nn.Identity)}

    def part(name: str) -> Part:
        kind = next(kind for begin, kind in kinds.items() if name.startswith(begin))
        return Part(name, kind)

    without = [name for name in names if name != "aa"]
    return structure.children_of(map(part, names), map(part, without))


def _layer(children: dict[str, Any], conv: str, bn: str) -> structure.Layer:
    norm = children[bn]
    activation = norm.__dict__["_modules"]["act"]
    found = None if type(activation) is nn.Identity else activation
    return members.layer(children[conv], norm, found, (conv, bn, f"{bn}.act"))


def layer_of(children: dict[str, Any], conv: str, bn: str) -> structure.Layer:
    """A convolution and a BatchNormAct2d of a network, by their names.

    Raises:
        RefusedError: they are not what the network's class makes, with the reason.
    """
    structure.require_children(children, _pair(conv, bn))
    return _layer(children, conv, bn)


@functools.cache
def _pair(conv: str, bn: str) -> structure.Children:
    return _children(_classes(Finder("auto", "fast")), conv, bn)


def _excite(children: dict[str, Any], channels: int) -> structure.Excite | None:
    se = children["se"]
    if type(se) is nn.Identity:
        return None
    table = members.children(se)
    try:
        return members.excite([*map(table.__getitem__, _SE_NAMES)], _SE_NAMES, channels)
    except RefusedError as refused:
        raise RefusedError(members.behind(".se", refused)) from None


def _skip(module: Any, children: dict[str, Any]) -> structure.Skip:
    drop_path = children["drop_path"]
    if type(drop_path) is nn.Identity or not drop_path.training:
        return structure.Skip(bool(module.has_skip), 0.0, ROW, True)
    if not drop_path.scale_by_keep:
        raise RefusedError(".drop_path keeps the scale")
    return structure.Skip(bool(module.has_skip), drop_path.drop_prob, ROW, True)


def _taken_apart(module: Any, allowed: structure.Children) -> dict[str, Any]:
    """The children of a block, which are what is allowed."""
    children = members.children(module)
    structure.require_children(children, allowed)
    if module.__dict__.get("conv_s2d") is not None:
        raise RefusedError(".conv_s2d is in use")
    return children


def _mbconv(*pairs: tuple[str, str]) -> Callable[[Finder], Callable[[Any], structure.Block]]:
    """The reader of a block of convolutions, each with its norm: [expand,] depthwise, project."""
    first, project_pair = [name for pair in pairs[:-1] for name in pair], pairs[-1]
    names = (*[""] * (3 - len(pairs)), *(conv for conv, _ in pairs))

    def reader(find: Finder) -> Callable[[Any], structure.Block]:
        allowed = _children(_classes(find), *first, "aa", "se", *project_pair, "drop_path")

        def read(module: Any) -> structure.Block:
            children = _taken_apart(module, allowed)
            *expand, depthwise, project = (_layer(children, *pair) for pair in pairs)
            excited = _excite(children, depthwise.conv.out_channels)
            skip = _skip(module, children)
            rest = excited, project, skip, (names[0], names[1], names[2]), find.memory
            return members.block(expand[0] if expand else None, depthwise, *rest)

        return members.without_dot(read)

    return reader


def _edge(find: Finder) -> Callable[[Any], Any]:
    names = ("conv_exp", "bn1", "aa", "se", "conv_pwl", "bn2", "drop_path")
    allowed = _children(_classes(find), *names)

    def read(module: Any) -> Any:
        children = _taken_apart(module, allowed)
        if type(children["se"]) is not nn.Identity:
            raise RefusedError(".se is in use, which no kernel has behind a dense convolution")
        dense = _layer(children, "conv_exp", "bn1")
        project = _layer(children, "conv_pwl", "bn2")
        skip = _skip(module, children)
        return members.dense_block(dense, project, skip, ("conv_exp", "conv_pwl"), find.memory)

    return members.without_dot(read)


def _plain(find: Finder) -> Callable[[Any], Any]:
    allowed = _children(_classes(find), "conv", "bn1", "aa", "drop_path")

    def read(module: Any) -> Any:
        children = _taken_apart(module, allowed)
        dense = _layer(children, "conv", "bn1")
        return members.dense_block(dense, None, _skip(module, children), ("conv", ""), find.memory)

    return members.without_dot(read)


def is_pointwise(block: Any) -> bool:
    """Whether a module is a 1x1 ConvBnAct, which is no block."""
    conv = getattr(block, "_modules", {}).get("conv")
    is_plain = path_of(own_class(type(block))) == f"{_BLOCKS}:ConvBnAct"
    return is_plain and getattr(conv, "kernel_size", None) == (1, 1)


def pointwise_layer(block: Any) -> structure.Layer:
    """The layer of a 1x1 ConvBnAct.

    Raises:
        RefusedError: it is more than that, with the reason.
    """
    structure.require(block)
    children = _taken_apart(block, _plain_children())
    if block.has_skip:
        raise RefusedError(".has_skip is on")
    return _layer(children, "conv", "bn1")


@functools.cache
def _plain_children() -> structure.Children:
    return _children(_classes(Finder("auto", "fast")), "conv", "bn1", "aa", "drop_path")


CODE = tuple(f"{kind}.forward" for kind in (_NORM, _SAME, _SE, _DROP, _SWISH, _SIGMOID))
_TENSORS = "weight bias"
MEMBERS = (
    (_NORM, f"{_TENSORS} running_mean running_var num_batches_tracked drop act"),
    (_SAME, _TENSORS),
    (_SE, " ".join(_SE_NAMES)),
)
SETTINGS = (
    (_SAME, " ".join(CONVOLUTION)),
    (_NORM, "training eps"),
    (_DROP, "training drop_prob scale_by_keep"),
)
_BLOCK_NAMES = "conv_pw bn1 conv_dw bn2 aa se conv_pwl bn3 drop_path conv_exp conv"
for _name, _reader in {
    "DepthwiseSeparableConv": _mbconv(("conv_dw", "bn1"), ("conv_pw", "bn2")),
    "InvertedResidual": _mbconv(("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
    "EdgeResidual": _edge,
    "ConvBnAct": _plain,
}.items():
    _path = f"{_BLOCKS}:{_name}"
    RECIPES[_path] = Recipe(
        (f"{_path}.forward", *CODE),
        _reader,
        below=(stock.BLOCK,),
        members=(*MEMBERS, (_path, _BLOCK_NAMES)),
        settings=(*SETTINGS, (_path, "has_skip conv_s2d")),
    )
