"""The readers of Hugging Face transformers' EfficientNet: its blocks, and its stem.

A block's parts are modules of their own with their own forward. Strided convolutions are padded by
a module before them, others by the name "same". Dropout takes single elements.

Source: transformers/models/efficientnet/modeling_efficientnet.py of transformers 5.24,
https://github.com/huggingface/transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from effnet_fast.modules import stock, structure
from effnet_fast.modules.foreign import RECIPES, Finder, Fused, Recipe
from effnet_fast.modules.readers import members
from effnet_fast.modules.readers.own import CONVOLUTION
from effnet_fast.modules.stochastic_depth import ELEMENTS
from effnet_fast.modules.structure import Part, RefusedError

_MODELS = "transformers.models.efficientnet.modeling_efficientnet"
_STEM = f"{_MODELS}:EfficientNetEmbeddings"
_BLOCK = f"{_MODELS}:EfficientNetBlock"
_EXPAND = f"{_MODELS}:EfficientNetExpansionLayer"
_DEPTHWISE = f"{_MODELS}:EfficientNetDepthwiseLayer"
_CONV = f"{_MODELS}:EfficientNetDepthwiseConv2d"
_SE = f"{_MODELS}:EfficientNetSqueezeExciteLayer"
_PROJECT = f"{_MODELS}:EfficientNetFinalBlockLayer"
_SILU = "transformers.activations:SiLUActivation"
# The children of each in the order of their making.
_STEM_NAMES = "padding", "convolution", "batchnorm", "activation"
_EXPAND_NAMES = "expand_conv", "expand_bn", "expand_act"
_DEPTHWISE_NAMES = "depthwise_conv_pad", "depthwise_conv", "depthwise_norm", "depthwise_act"
_SE_NAMES = "squeeze", "reduce", "expand", "act_reduce", "act_expand"
_PROJECT_NAMES = "project_conv", "project_bn", "dropout"
_BLOCK_NAMES = "expansion", "depthwise_conv", "squeeze_excite", "projection"
_EXCITE_NAMES = "reduce", "act_reduce", "expand", "act_expand"  # in the order of their calls


def _children(names: tuple[str, ...], *kinds: structure.Kinds) -> structure.Children:
    return structure.children_of([Part(*part) for part in zip(names, kinds, strict=True)])


def _activations(find: Finder) -> structure.Kinds:
    silu = find(_SILU)
    structure.ACTIVATIONS[silu] = "silu"
    return structure.one_of(*members.ACTIVATIONS, silu)


def _layer(module: Any, names: members.Names, pad: str | None = None) -> structure.Layer:
    """Convolution, BatchNorm and activation of these names, and what pads before.

    Args:
        names: the last is empty where there is no activation.
        pad: the name of the module that pads; None where none is called.
    """
    children = members.children(module)
    sides = None if pad is None else members.padded(children[pad], pad)
    conv, bn, activation = names
    return members.layer(children[conv], children[bn], children.get(activation), names, sides)


def _depthwise(module: Any) -> structure.Layer:
    pads = module.stride == 2
    return _layer(module, _DEPTHWISE_NAMES[1:], _DEPTHWISE_NAMES[0] if pads else None)


def _excite(module: Any, channels: int) -> structure.Excite:
    children = members.children(module)
    members.require_pooled(children["squeeze"], "squeeze")
    return members.excite([*map(children.__getitem__, _EXCITE_NAMES)], _EXCITE_NAMES, channels)


def _skip(module: Any) -> structure.Skip:
    if not module.apply_dropout:
        return structure.Skip(False, 0.0, ELEMENTS, False)
    dropout = members.children(module)["dropout"]
    p = members.probability(dropout.p, ".dropout.p")
    return structure.Skip(True, p if dropout.training else 0.0, ELEMENTS, True)


def _stem(find: Finder) -> Callable[[Any], structure.Layer]:
    kinds = structure.one_of(nn.ZeroPad2d), structure.one_of(nn.Conv2d)
    norm = structure.one_of(*members.NORMS)
    allowed = _children(_STEM_NAMES, *kinds, norm, _activations(find))

    def read(module: Any) -> structure.Layer:
        try:
            structure.require_children(members.children(module), allowed)
            return _layer(module, _STEM_NAMES[1:], _STEM_NAMES[0])
        except RefusedError as refused:
            raise RefusedError(members.behind(type(module).__name__, refused)) from None

    return read


@functools.cache
def _pointwise_children(names: members.Names) -> structure.Children:
    kinds = structure.one_of(nn.Conv2d), structure.one_of(*members.NORMS)
    return _children(names, *kinds, _activations(Finder("auto", "fast")))


def layer_of(children: dict[str, Any], names: members.Names) -> structure.Layer:
    """A network's convolution, BatchNorm and activation, by their names.

    Raises:
        RefusedError: they are not what the network's class makes, with the reason.
    """
    structure.require_children(children, _pointwise_children(names))
    conv, bn, activation = (children[name] for name in names)
    return members.layer(conv, bn, activation, names)


def _parts(find: Finder) -> tuple[structure.Children, structure.Children]:
    """The children of a block that expands, and of one that does not."""
    depthwise_conv = find(_CONV)
    members.PADDINGS[depthwise_conv] = members.sides
    activation = _activations(find)
    conv, norm = structure.one_of(nn.Conv2d), structure.one_of(*members.NORMS)
    pool, pad = structure.one_of(nn.AdaptiveAvgPool2d), structure.one_of(nn.ZeroPad2d)
    gate = structure.one_of(*members.GATES)
    depthwise = pad, structure.one_of(depthwise_conv), norm, activation
    kinds: tuple[structure.Kinds, ...] = (
        {find(_EXPAND): _children(_EXPAND_NAMES, conv, norm, activation)},
        {find(_DEPTHWISE): _children(_DEPTHWISE_NAMES, *depthwise)},
        {find(_SE): _children(_SE_NAMES, pool, conv, conv, activation, gate)},
        {find(_PROJECT): _children(_PROJECT_NAMES, conv, norm, structure.one_of(nn.Dropout))},
    )
    return _children(_BLOCK_NAMES, *kinds), _children(_BLOCK_NAMES[1:], *kinds[1:])


def _block(find: Finder) -> Callable[[Any], structure.Block]:
    expands, plain = _parts(find)

    def read(module: Any) -> structure.Block:
        name = ""
        try:
            children = members.children(module)
            has_expand = module.expand_ratio != 1
            structure.require_children(children, expands if has_expand else plain)
            expand = None
            if has_expand:
                name = ".expansion"
                expand = _layer(children["expansion"], _EXPAND_NAMES)
            name = ".depthwise_conv"
            depthwise = _depthwise(children["depthwise_conv"])
            name = ".squeeze_excite"
            excited = _excite(children["squeeze_excite"], depthwise.conv.out_channels)
            name = ".projection"
            project = _layer(children["projection"], (*_PROJECT_NAMES[:2], ""))
            skip = _skip(children["projection"])
        except RefusedError as refused:
            raise RefusedError(members.behind(name, refused).removeprefix(".")) from None
        names = "expansion", "depthwise_conv", "projection"
        return members.block(expand, depthwise, excited, project, skip, names, find.memory)

    return read


RECIPES[_STEM] = Recipe(
    (f"{_STEM}.forward", f"{_SILU}.forward"),
    _stem,
    Fused,
    below=(stock.LAYER, stock.PAD),
    members=((_STEM, " ".join(_STEM_NAMES)),),
    is_block=False,
)
_OWN = {
    _BLOCK: _BLOCK_NAMES,
    _EXPAND: _EXPAND_NAMES,
    _DEPTHWISE: _DEPTHWISE_NAMES,
    _SE: _SE_NAMES,
    _PROJECT: _PROJECT_NAMES,
}
RECIPES[_BLOCK] = Recipe(
    tuple(f"{kind}.forward" for kind in (*_OWN, _SILU)),
    _block,
    Fused,
    below=(stock.BLOCK, stock.PAD, stock.DROPOUT),
    members=(
        *((kind, " ".join(names)) for kind, names in _OWN.items()),
        (_CONV, "weight bias"),
    ),
    settings=(
        (_BLOCK, "expand_ratio"),
        (_DEPTHWISE, "stride"),
        (_PROJECT, "apply_dropout"),
        (_CONV, " ".join(CONVOLUTION)),
    ),
    inherited=((_CONV, nn.Conv2d, "forward _conv_forward"),),
)
