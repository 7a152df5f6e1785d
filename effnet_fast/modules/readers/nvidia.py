"""The reader of NVIDIA's EfficientNet blocks.

Squeeze-excite's two layers are linear, or convolutions in the form for TensorRT. Drop-path takes
the bodies of all images of a batch at once, and adds by a function where it drops none. What was
made for quantization stays as it is.

Source: PyTorch/Classification/ConvNets/image_classification/models/{efficientnet,common}.py,
https://github.com/NVIDIA/DeepLearningExamples (729963d), which torch.hub has, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import linear

from effnet_fast.modules import stock, structure
from effnet_fast.modules.foreign import RECIPES, Finder, Recipe
from effnet_fast.modules.readers import members
from effnet_fast.modules.stochastic_depth import ONCE
from effnet_fast.modules.structure import Part, RefusedError

# Its own programs and torch.hub import it by these names.
PACKAGES = "image_classification", "PyTorch.Classification.ConvNets.image_classification"
BLOCK = "models.efficientnet:MBConvBlock"
_LINEAR_SE = "models.common:SequentialSqueezeAndExcitation"
_CONV_SE = "models.common:SequentialSqueezeAndExcitationTRT"
_DROP = "models.common:StochasticDepthResidual"
_SILU = "models.common:ONNXSiLU"
_ADD = torch.add
_SE_NAMES = "squeeze", "activation", "expand", "sigmoid"  # in the order of their calls
_SE_UNUSED = "mul_a_quantizer", "mul_b_quantizer"
_LINEAR = stock.Stock(
    (nn.Linear, "__call__ _call_impl forward"), (linear, "F"), members=((nn.Linear, "weight bias"),)
)


def _parts(*rows: tuple[str, structure.Kinds]) -> list[Part]:
    return [Part(*row) for row in rows]


def _activations(silu: type) -> structure.Kinds:
    structure.ACTIVATIONS[silu] = "silu"
    return structure.one_of(*members.ACTIVATIONS, silu)


def _layer_children(silu: type, last: str) -> structure.Children:
    """The children of a layer, whose activation has this name."""
    conv_bn = _parts(
        ("conv", structure.one_of(nn.Conv2d)), ("bn", structure.one_of(*members.NORMS))
    )
    return structure.children_of([*conv_bn, Part(last, _activations(silu))], conv_bn)


def _excite_children(classes: dict[str, Any], layer: type, *first: Part) -> structure.Children:
    """The children of a squeeze-excite in the order of their making; activation is given to it."""
    identity, layers = structure.one_of(nn.Identity), structure.one_of(layer)
    rows = _parts(
        ("squeeze", layers), ("expand", layers), ("activation", _activations(classes["silu"])),
        ("sigmoid", structure.one_of(nn.Sigmoid)), *((name, identity) for name in _SE_UNUSED),
    )  # fmt: skip
    return structure.children_of([*first, *rows])


def _children(classes: dict[str, Any]) -> structure.Children:
    """A block's children, with and without an expansion and a module that drops."""
    layer: structure.Kinds = {nn.Sequential: _layer_children(classes["silu"], "act")}
    pool = Part("pooling", structure.one_of(nn.AdaptiveAvgPool2d))
    se: structure.Kinds = {
        classes["linear_se"]: _excite_children(classes, nn.Linear),
        classes["conv_se"]: _excite_children(classes, nn.Conv2d, pool),
    }
    body = _parts(("depsep", layer), ("se", se), ("proj", layer))
    last = Part("residual_quantizer", structure.one_of(nn.Identity))
    rows = [[*begin, *body] for begin in ([], _parts(("expand", layer)))]
    drops = Part("residual_add", structure.one_of(classes["drop"]))
    return structure.children_of(*([*row, *end] for row in rows for end in ([last], [drops, last])))


def _layer(children: dict[str, Any], name: str) -> structure.Layer:
    """A layer that is a sequence of this name."""
    try:
        found = members.children(children[name])
        names = "conv", "bn", "act"
        return members.layer(found["conv"], found["bn"], found.get("act"), names)
    except RefusedError as refused:
        raise RefusedError(members.behind(f".{name}", refused)) from None


def _excite(se: Any, channels: int) -> structure.Excite:
    try:
        children = members.children(se)
        if se.quantized:
            raise RefusedError(" is quantized")
        if "_attention" in se.__dict__:
            raise RefusedError(" has a patched _attention")
        if "pooling" in children:
            members.require_pooled(children["pooling"], "pooling")
        return members.excite([children[name] for name in _SE_NAMES], _SE_NAMES, channels)
    except RefusedError as refused:
        raise RefusedError(members.behind(".se", refused)) from None


def _skip(module: Any, children: dict[str, Any]) -> structure.Skip:
    if not module.residual:
        return structure.Skip(False, 0.0, ONCE, False)
    drop = children.get("residual_add")
    if drop is None:
        if module.residual_add is not _ADD:
            raise RefusedError(".residual_add is not torch.add")
        return structure.Skip(True, 0.0, ONCE, True)
    if not drop.training:
        return structure.Skip(True, 0.0, ONCE, True)
    p = members.probability(1 - drop.survival_prob, ".residual_add.survival_prob drops by what")
    _require_mask(drop)
    return structure.Skip(True, p, ONCE, True)


def _require_mask(drop: Any) -> None:
    """Raises RefusedError for a mask that is not the fp32 one that the class makes.

    Its value on a GPU is not read, which would wait for it.
    """
    if "mask" in drop.__dict__:
        raise structure.hidden(drop.__dict__, ("mask",))
    mask = drop.__dict__["_buffers"].get("mask")
    if type(mask) is not Tensor or mask.shape or mask.dtype is not torch.float32:
        raise RefusedError(".residual_add.mask is no number in float32")
    if mask.device.type == "cpu" and mask.item() != 1:
        raise RefusedError(f".residual_add.mask is {mask.item()}")


def _block(package: str, find: Finder) -> Callable[[Any], structure.Block]:
    allowed = _children(_classes(package))

    def read(module: Any) -> structure.Block:
        children = members.children(module)
        structure.require_children(children, allowed)
        if module.quantized:
            raise RefusedError(".quantized is set")
        expands = "expand" in children
        if not expands and module.expand is not None:
            raise RefusedError(".expand is no module")
        expand = _layer(children, "expand") if expands else None
        depthwise = _layer(children, "depsep")
        excited = _excite(children["se"], depthwise.conv.out_channels)
        project = _layer(children, "proj")
        names = "expand", "depsep", "proj"
        skip = _skip(module, children)
        return members.block(expand, depthwise, excited, project, skip, names, find.memory)

    return members.without_dot(read)


_PATHS = {"linear_se": _LINEAR_SE, "conv_se": _CONV_SE, "drop": _DROP, "silu": _SILU}


def _classes(package: str) -> dict[str, Any]:
    find = Finder("auto", "fast")
    return {name: find(f"{package}.{path}") for name, path in _PATHS.items()}


@functools.cache
def _sequence(package: str) -> structure.Kinds:
    silu = Finder("auto", "fast")(f"{package}.{_SILU}")
    return {nn.Sequential: _layer_children(silu, "activation")}


def layer_of(package: str, name: str, sequence: Any) -> structure.Layer:
    """A network's convolution, BatchNorm and activation, which are a sequence of this name.

    Raises:
        RefusedError: they are not what the network's class makes, with the reason.
    """
    allowed = structure.children_of([Part(name, _sequence(package))])
    structure.require_children({name: sequence}, allowed)
    names = "conv", "bn", "activation"
    conv, bn, activation = map(members.children(sequence).get, names)
    return members.layer(conv, bn, activation, names)


def _recipe(package: str) -> Recipe:
    block, linear_se, conv_se, drop, silu = (
        f"{package}.{path}" for path in (BLOCK, _LINEAR_SE, _CONV_SE, _DROP, _SILU)
    )
    excites = linear_se, conv_se
    se_members = " ".join((*_SE_NAMES, *_SE_UNUSED, "pooling"))
    return Recipe(
        (
            *(f"{path}.forward" for path in (block, *excites, drop, silu)),
            *(f"{path}._attention" for path in excites),
        ),
        functools.partial(_block, package),
        below=(stock.BLOCK, stock.DROPOUT, _LINEAR),
        members=(
            (block, "expand depsep se proj residual_add residual_quantizer"),
            *((path, se_members) for path in excites),
            (drop, "mask"),
        ),
        settings=(
            (block, "quantized residual residual_add expand"),
            *((path, "quantized _attention") for path in excites),
            (drop, "training survival_prob"),
        ),
    )


for _package in PACKAGES:
    RECIPES[f"{_package}.{BLOCK}"] = _recipe(_package)
