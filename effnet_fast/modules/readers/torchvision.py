"""The readers of torchvision's blocks, whose tree is this package's own.

Source: torchvision/models/efficientnet.py of torchvision 0.26 to 0.29,
https://github.com/pytorch/vision.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from effnet_fast.modules import stock, structure
from effnet_fast.modules.foreign import RECIPES, Finder, Recipe
from effnet_fast.modules.readers import members
from effnet_fast.modules.readers.own import TreeReader, layer_children, named_layer

_MODELS = "torchvision.models.efficientnet"
_CONV = "torchvision.ops.misc:Conv2dNormActivation"
_SE = "torchvision.ops.misc:SqueezeExcitation"
_FROZEN = "torchvision.ops.misc:FrozenBatchNorm2d"
_DROP = "torchvision.ops.stochastic_depth:StochasticDepth"


def _children(find: Finder) -> structure.Children:
    frozen = find(_FROZEN)
    members.FROZEN.add(frozen)
    return layer_children(frozen)


def _layer(find: Finder) -> Callable[[Any], Any]:
    return partial(named_layer, allowed=_children(find))


def _tree(find: Finder) -> TreeReader:
    convs = find(_CONV), find.fused(_CONV)
    return TreeReader(convs, find(_SE), find(_DROP), find.memory, _children(find))


def _mbconv(find: Finder) -> Callable[[Any], Any]:
    return _tree(find).mbconv


def _fused_mbconv(find: Finder) -> Callable[[Any], Any]:
    return _tree(find).fused_mbconv


# Their forward is nn.Sequential's.
RECIPES[_CONV] = Recipe(
    (f"{_FROZEN}.forward",),
    _layer,
    below=(stock.LAYER, stock.CALLED_LAYER),
    members=((_FROZEN, "weight bias running_mean running_var"),),
    settings=((_FROZEN, "eps"),),
    is_block=False,
)
for _name, _reader in {"MBConv": _mbconv, "FusedMBConv": _fused_mbconv}.items():
    _path = f"{_MODELS}:{_name}"
    RECIPES[_path] = Recipe(
        (f"{_path}.forward", f"{_SE}.forward", f"{_SE}._scale", f"{_DROP}.forward"),
        _reader,
        members=(
            (_path, "block stochastic_depth"),
            (_SE, "avgpool fc1 fc2 activation scale_activation"),
        ),
        settings=((_path, "use_res_connect"), (_DROP, "training p mode")),
        parts=(_CONV,),
    )
