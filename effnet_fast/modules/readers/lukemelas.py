"""The readers of efficientnet_pytorch's block, and of its copies in two other packages.

The copies are those of efficientnet_lite_pytorch, whose activation may be ReLU6, and of
segmentation_models_pytorch, whose flags have other names. A block's children are the convolutions
and norms themselves and one activation, which stands behind both layers and in the
squeeze-and-excitation; the gate is a sigmoid that is no module. A convolution pads by the size of
its input, or by a child that was made for one size.

Sources: efficientnet_pytorch/model.py and utils.py of efficientnet_pytorch 0.7.1,
https://github.com/lukemelas/EfficientNet-PyTorch; those of efficientnet_lite_pytorch 0.1.0,
https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch; encoders/_efficientnet.py of
segmentation_models_pytorch 0.6, https://github.com/qubvel-org/segmentation_models.pytorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import padding

from effnet_fast.modules import stock, structure
from effnet_fast.modules.foreign import RECIPES, Finder, FusedWithDropRate, Recipe
from effnet_fast.modules.readers import members
from effnet_fast.modules.readers.own import CONVOLUTION
from effnet_fast.modules.stochastic_depth import UNIFORM
from effnet_fast.modules.structure import Part, RefusedError
from effnet_fast.reference.arguments import Sides

_DYNAMIC, _STATIC = "Conv2dDynamicSamePadding", "Conv2dStaticSamePadding"
_EXPAND, _DEPTHWISE, _PROJECT = "_expand_conv", "_depthwise_conv", "_project_conv"
_SE_NAMES = "_se_reduce", "_swish", "_se_expand", ""  # of the last, the gate, there is no module
_NAMES = f"{_EXPAND} _bn0 {_DEPTHWISE} _bn1 _se_reduce _se_expand {_PROJECT} _bn2 _swish"
_PADS = stock.Stock(
    (nn.ZeroPad2d, "__call__ _call_impl forward"),
    (padding, "F"),
    (torch.Tensor, "__radd__"),
    below=(stock.ACTIVATIONS["identity"],),
    pinned=((torch.Tensor, "__rsub__", torch.Tensor.__rsub__),),
)


class _Flags(NamedTuple):
    """What a block's forward runs."""

    expands: bool
    excites: bool
    residual: bool


def _flags(module: Any) -> _Flags:
    """As forward of efficientnet_pytorch reads them: a stride that is a list is not 1."""
    args = module._block_args
    fits = module.id_skip and args.stride == 1 and args.input_filters == args.output_filters
    return _Flags(args.expand_ratio != 1, bool(module.has_se), bool(fits))


def _flags_of_smp(module: Any) -> _Flags:
    flags = module._has_expansion, module._has_se, module._has_drop_connect
    return _Flags(*map(bool, flags))


class _Package(NamedTuple):
    """A package that has the block.

    Args:
        block: the module that has its class.
        parts: that which has the classes of its children.
        activations: names of classes there that are a SiLU.
        identity: the path of the class that pads nothing.
        flags: reads a block's.
        keeps_absent: whether there is an identity in the place of an absent expansion.
        settings: attributes of a block that flags reads, and its mode.
    """

    block: str
    parts: str
    activations: tuple[str, ...]
    identity: str = ""
    flags: Callable[[Any], _Flags] = _flags
    keeps_absent: bool = False
    settings: str = "_block_args id_skip has_se training"


def _require_no_padding(conv: Any) -> None:
    if conv.padding != (0, 0):
        raise RefusedError(f" has padding {conv.padding} beside its own")


def _static(conv: Any) -> Sides:
    """The padding by a child, which was made for a size of image that may be another now."""
    _require_no_padding(conv)
    if "static_padding" in conv.__dict__:
        raise structure.hidden(conv.__dict__, ("static_padding",))
    pad = conv.__dict__["_modules"]["static_padding"]
    if type(pad) is not nn.ZeroPad2d:
        return 0, 0, 0, 0
    sides = pad.padding
    is_plain = type(sides) is tuple and len(sides) == 4 and all(type(n) is int for n in sides)
    if not is_plain or min(sides) < 0 or pad.value != 0:
        raise RefusedError(f".static_padding pads {sides} with {pad.value}")
    return sides


Table = dict[tuple[bool, bool], structure.Children]  # by whether a block expands and excites


def _kinds(package: _Package, find: Finder) -> dict[str, structure.Kinds]:
    """The classes of a block's children, and how they are read."""
    dynamic, static = (find(f"{package.parts}:{name}") for name in (_DYNAMIC, _STATIC))
    members.PADDINGS |= {dynamic: _require_no_padding, static: _static}
    members.LISTS.update((dynamic, static))
    own = [find(f"{package.parts}:{name}") for name in package.activations]
    structure.ACTIVATIONS.update(dict.fromkeys(own, "silu"))
    identities = [find(package.identity)] if package.identity else []
    pads = structure.one_of(nn.ZeroPad2d, nn.Identity, *identities)
    padded = structure.children_of((Part("static_padding", pads),))
    conv: structure.Kinds = {dynamic: None, static: padded}
    norm = structure.one_of(*members.NORMS)
    kinds: dict[str, structure.Kinds] = dict.fromkeys(_NAMES.split(), conv)
    kinds |= dict.fromkeys(("_bn0", "_bn1", "_bn2"), norm)
    kinds["_swish"] = structure.one_of(*members.ACTIVATIONS, *own)
    return kinds


def _table(package: _Package, find: Finder) -> Table:
    """The children of a block."""
    kinds, identity = _kinds(package, find), structure.one_of(nn.Identity)

    def children(expands: bool, excites: bool) -> structure.Children:
        met = dict(kinds)
        for name in () if expands else (_EXPAND, "_bn0"):
            if package.keeps_absent:
                met[name] = identity
            else:
                del met[name]
        for name in () if excites else ("_se_reduce", "_se_expand"):
            del met[name]
        return structure.children_of(Part(*row) for row in met.items())

    return {(e, s): children(e, s) for e in (True, False) for s in (True, False)}


def _taken_apart(module: Any, table: Table, flags: _Flags) -> dict[str, Any]:
    """The children of a block by name, once they are what its forward runs, and no more."""
    children = members.children(module)
    structure.require_children(children, table[flags[:2]])
    return children


def _probability(rate: Any) -> float:
    """Of drop-path, by what forward is given. Forward raises for a rate that it cannot take."""
    if rate is None:
        return 0.0
    if type(rate) not in (int, float) or not 0 <= rate <= 1:
        raise RefusedError(f"drop_connect_rate is {rate}")
    return float(rate)


def _mbconv(package: _Package, find: Finder) -> Callable[..., structure.Block]:
    """The reader of the package's block."""
    table = _table(package, find)

    def read(module: Any, drop_connect_rate: Any = None) -> structure.Block:
        flags = package.flags(module)
        children = _taken_apart(module, table, flags)
        activation = children["_swish"]

        def layer(conv: str, bn: str, followed: Any = None) -> structure.Layer:
            return members.layer(children[conv], children[bn], followed, (conv, bn, "_swish"))

        expand = layer(_EXPAND, "_bn0", activation) if flags.expands else None
        depthwise = layer(_DEPTHWISE, "_bn1", activation)
        excited = None
        if flags.excites:
            parts = children["_se_reduce"], activation, children["_se_expand"], None
            excited = members.excite(parts, _SE_NAMES, depthwise.conv.out_channels)
        project = layer(_PROJECT, "_bn2")
        rate = _probability(drop_connect_rate) if flags.residual else 0.0
        probability = rate if module.training else 0.0
        skip = structure.Skip(flags.residual, probability, UNIFORM, flags.residual)
        names = _EXPAND, _DEPTHWISE, _PROJECT
        return members.block(expand, depthwise, excited, project, skip, names, find.memory)

    return members.without_dot(read)


def _recipe(package: _Package) -> Recipe:
    block, dynamic, static = (
        f"{package.block}:MBConvBlock", f"{package.parts}:{_DYNAMIC}", f"{package.parts}:{_STATIC}"
    )  # fmt: skip
    own = [f"{package.parts}:{name}" for name in package.activations]
    convs = dynamic, static
    kinds = [block, *convs, *own, *([package.identity] if package.identity else [])]
    return Recipe(
        tuple(f"{kind}.forward" for kind in kinds),
        lambda find: _mbconv(package, find),
        FusedWithDropRate,
        (stock.BLOCK, _PADS),
        ((block, _NAMES), (dynamic, "weight bias"), (static, "weight bias static_padding")),
        settings=((block, package.settings), *((kind, " ".join(CONVOLUTION)) for kind in convs)),
    )


@functools.cache
def layer_reader(name: str) -> Callable[[dict[str, Any]], structure.Layer]:
    """Reads a network's convolution, BatchNorm and activation, given by their names in order.

    Args:
        name: of the package.
    """
    kinds = _kinds(PACKAGES[name], Finder("auto", "fast"))
    classes = kinds[_DEPTHWISE], kinds["_bn1"], kinds["_swish"]

    def read(children: dict[str, Any]) -> structure.Layer:
        conv, bn, activation = children
        names = conv, bn, activation
        allowed = structure.children_of([Part(*part) for part in zip(names, classes, strict=True)])
        structure.require_children(children, allowed)
        return members.layer(children[conv], children[bn], children[activation], names)

    return read


_LITE = "efficientnet_lite_pytorch"
_SMP = "segmentation_models_pytorch.encoders._efficientnet"
PACKAGES = {
    "efficientnet_pytorch": _Package(
        "efficientnet_pytorch.model", "efficientnet_pytorch.utils", ("MemoryEfficientSwish",)
    ),
    _LITE: _Package(
        f"{_LITE}.model", f"{_LITE}.utils", ("MemoryEfficientSwish", "Swish"),
        f"{_LITE}.utils:Identity",
    ),
    "segmentation_models_pytorch": _Package(
        _SMP, _SMP, (), flags=_flags_of_smp, keeps_absent=True,
        settings="_has_expansion _has_se _has_drop_connect training",
    ),
}  # fmt: skip
for _package in PACKAGES.values():
    RECIPES[f"{_package.block}:MBConvBlock"] = _recipe(_package)
