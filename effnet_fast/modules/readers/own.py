"""The readers of torchvision's tree, and so of this package's own modules, `layers`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from effnet_fast.modules import layers, stock, structure
from effnet_fast.modules.dense_block import DenseBlock
from effnet_fast.modules.fused_mbconv import FusedMBConv
from effnet_fast.modules.readers import members
from effnet_fast.modules.same_padding import Conv2dSame
from effnet_fast.modules.stochastic_depth import BATCH, ROW, StochasticDepth
from effnet_fast.modules.structure import Part, RefusedError

_NAMES = "0", "1", "2"
_SE_NAMES = "fc1", "activation", "fc2", "scale_activation"
_ACTIVATION, _GATE = (structure.one_of(*k) for k in (structure.ACTIVATIONS, structure.GATES))


def layer_children(*norms: type) -> structure.Children:
    """The children of a Conv2dNormActivation."""
    conv_bn = (
        Part("0", structure.one_of(nn.Conv2d, Conv2dSame)),
        Part("1", structure.one_of(*members.NORMS, *norms)),
    )
    return structure.children_of(conv_bn, (*conv_bn, Part("2", _ACTIVATION)))


_LAYER = layer_children()
_EXCITE = structure.children_of((
    Part("avgpool", structure.one_of(nn.AdaptiveAvgPool2d)),
    Part("fc1", structure.one_of(nn.Conv2d)), Part("fc2", structure.one_of(nn.Conv2d)),
    Part("activation", _ACTIVATION), Part("scale_activation", _GATE),
))  # fmt: skip


def _body(*kinds: structure.Kinds) -> list[Part]:
    """Layers in a row, and squeeze-excites."""
    return [Part(str(index), kind) for index, kind in enumerate(kinds)]


def named_layer(module: nn.Module, allowed: structure.Children = _LAYER) -> structure.Layer:
    """A layer that is no part of a block, with the class in front of a reason."""
    try:
        structure.require_children(module.__dict__["_modules"], allowed)
        return _layer(module)
    except RefusedError as refused:
        raise RefusedError(members.behind(type(module).__name__, refused)) from None


def _layer(module: nn.Module) -> structure.Layer:
    """Takes a Conv2dNormActivation apart, whose children are what is allowed."""
    children = module.__dict__["_modules"]
    return members.layer(children["0"], children["1"], children.get("2"), _NAMES)


def _excite(module: nn.Module, channels: int) -> structure.Excite:
    """Takes a SqueezeExcitation with children that are allowed apart."""
    state = module.__dict__  # not by `members.children`: an excite is read at every call
    children = state["_modules"]
    if not state.keys().isdisjoint(children):
        raise structure.hidden(state, children)
    found = members.excite([*map(children.__getitem__, _SE_NAMES)], _SE_NAMES, channels)
    pooled = children["avgpool"].output_size
    if pooled not in (1, (1, 1)):
        raise RefusedError(f".avgpool pools to {pooled}")
    return found


def _own_children(module: nn.Module, allowed: structure.Children) -> tuple[Any, dict[str, Any]]:
    """Drop-path and the layers of a block whose children are allowed."""
    state = module.__dict__
    table = state["_modules"]
    own = {"block": table.get("block"), "stochastic_depth": table.get("stochastic_depth")}
    if not state.keys().isdisjoint(own):
        raise structure.hidden(state, own)
    structure.require_children(own, allowed)
    return own["stochastic_depth"], own["block"].__dict__["_modules"]


def _skip(module: Any, drop_path: Any) -> structure.Skip:
    p, mode, residual = drop_path.p, drop_path.mode, bool(module.use_res_connect)
    if residual and (type(p) not in (int, float) or not 0 <= p <= 1 or mode not in (ROW, BATCH)):
        raise RefusedError(f"stochastic_depth has p {p} and mode {mode}")
    return structure.Skip(residual, p if drop_path.training else 0.0, mode, False)


class TreeReader:
    """The readers of blocks in torchvision's tree.

    Args:
        conv: the classes of a convolution with what follows it.
        se: the class of a squeeze-excite.
        drop_path: that of stochastic depth.
        memory: of the blocks, None for their own attribute.
        layer: what follows the convolution, as `layer_children`.
    """

    def __init__(
        self,
        conv: Iterable[type],
        se: type,
        drop_path: type,
        memory: str | None = None,
        layer: structure.Children = _LAYER,
    ) -> None:
        convs: structure.Kinds = dict.fromkeys(conv, layer)
        ses: structure.Kinds = {se: _EXCITE}
        self._se, self._memory = se, memory
        # [expand,] depthwise, [squeeze-excite,] project; of three, the second is either.
        either = convs | ses
        bodies = (
            _body(convs, convs), _body(convs, either, convs), _body(convs, convs, ses, convs)
        )  # fmt: skip
        dense = _body(convs), _body(convs, convs)
        self._mbconv, self._fused = (
            structure.children_of((
                Part("block", {nn.Sequential: structure.children_of(*rows)}),
                Part("stochastic_depth", structure.one_of(drop_path)),
            ))
            for rows in (bodies, dense)
        )  # fmt: skip

    def mbconv(self, module: Any) -> structure.Block:
        """Takes an MBConv apart."""
        name = ""
        try:
            drop_path, children = _own_children(module, self._mbconv)
            *first, last = children
            third = first.pop() if type(children[first[-1]]) is self._se else None
            second = first.pop()
            expand = None
            for name in first:
                expand = _layer(children[name])
            name = second
            depthwise = _layer(children[name])
            excited = None
            if third is not None:
                name = third
                excited = _excite(children[name], depthwise.conv.out_channels)
            name = last
            project = _layer(children[name])
        except RefusedError as refused:
            raise _placed(name, refused) from None
        names = "block.0", "block.1", f"block.{last}"
        skip = _skip(module, drop_path)
        return members.block(
            expand, depthwise, excited, project, skip, names, self._memory or module.memory
        )

    def fused_mbconv(self, module: Any) -> DenseBlock:
        """Takes a FusedMBConv apart."""
        name = ""
        try:
            drop_path, children = _own_children(module, self._fused)
            found = []
            for name in children:
                found.append(_layer(children[name]))
        except RefusedError as refused:
            raise _placed(name, refused) from None
        project = found[1] if len(found) == 2 else None
        names, memory = ("block.0", "block.1"), self._memory or module.memory
        return members.dense_block(found[0], project, _skip(module, drop_path), names, memory)


def _placed(name: str, refused: RefusedError) -> RefusedError:
    """The reason with the block's child in front, or without the dot where it names one."""
    text = members.behind(f"block.{name}", refused) if name else str(refused)[1:]
    return RefusedError(text)


CONVOLUTION = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    "padding_mode",
)
structure.SETTINGS |= {
    nn.Conv2d: CONVOLUTION,
    Conv2dSame: (*CONVOLUTION, "sides"),
    nn.BatchNorm2d: ("training", "eps"),
    nn.SyncBatchNorm: ("training", "eps"),
    nn.ReLU6: ("min_val", "max_val"),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.ConstantPad2d: ("padding", "value"),
    nn.ZeroPad2d: ("padding", "value"),
    nn.Dropout: ("training", "p"),
    StochasticDepth: ("training", "p", "mode"),
    layers.MBConv: ("use_res_connect",),
    FusedMBConv: ("use_res_connect",),
}
_reader = TreeReader((layers.Conv2dNormActivation,), layers.SqueezeExcitation, StochasticDepth)
structure.reads(layers.Conv2dNormActivation, named_layer, stock.LAYER.require, is_block=False)
structure.reads(layers.MBConv, _reader.mbconv, stock.BLOCK.require)
structure.reads(FusedMBConv, _reader.fused_mbconv, stock.BLOCK.require)
structure.checks_code(stock.NETWORK.require)
