"""What a module consists of, if it is exactly what the fused ops can stand in for.

The children are read at each call. Whatever is not recognised - a hook, a replaced or parametrised
layer, a patched forward - is refused with the reason.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from effnet_fast.modules import layers
from effnet_fast.modules.same_padding import Conv2dSame

PLAIN = (Tensor, nn.Parameter)
CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
DENSE, DEPTHWISE, POINTWISE = "dense", "depthwise", "pointwise"
# The op that a layer of each kind is.
OPS = {
    DENSE: "stem_conv_bn_silu",
    DEPTHWISE: "dwconv_bn_silu",
    POINTWISE: "pointwise_bn_act",
}
_MISSING = object()


class RefusedError(Exception):
    """A module that is not what the fused path knows; the text is the reason.

    The checks run at every call, so they build no text unless they fail: a reason names the module
    from the inside out, each level putting its own name in front.
    """


class Layer(NamedTuple):
    """A convolution with its BatchNorm, and whether a SiLU follows.

    tensors: weight [Cout,Cin/groups,K,K], and the BatchNorm's weight, bias, mean and variance.
    """

    kind: str
    conv: nn.Conv2d
    bn: nn.BatchNorm2d
    silu: bool
    module: layers.Conv2dNormActivation
    tensors: tuple[Tensor | None, ...]

    @property
    def first(self) -> Layer:
        """The layer that sees the input."""
        return self

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """All tensors that the fused op reads."""
        return self.tensors


class Block(NamedTuple):
    """The layers of an MBConv; excite: weight and bias of fc1 and fc2."""

    expand: Layer | None
    depthwise: Layer
    squeeze: layers.SqueezeExcitation
    excite: tuple[Any, Any, Any, Any]
    project: Layer

    @property
    def first(self) -> Layer:
        """The layer that sees the input."""
        return self.expand or self.depthwise

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """All tensors that the fused op reads."""
        expand = self.expand.tensors if self.expand else ()
        return (*expand, *self.depthwise.tensors, *self.excite, *self.project.tensors)


def refuse_hooks(module: nn.Module) -> None:
    """Raises RefusedError for a module with hooks or a forward of its instance's own."""
    state = module.__dict__
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        raise RefusedError(" has a hook")
    if "forward" in state:
        raise RefusedError(" has a patched forward")


def _refuse_global_hooks() -> None:
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        raise RefusedError("a global module hook is registered")


def require(module: nn.Module | None, *kinds: type) -> None:
    """Raises RefusedError for a module of none of these classes, or with hooks."""
    if type(module) not in kinds:
        raise RefusedError(f" is {type(module).__name__}, not {kinds[0].__name__}")
    assert module is not None
    refuse_hooks(module)


def _refuse_tensor(name: str) -> RefusedError:
    return RefusedError(f".{name} is no plain tensor")


def _conv_kind(conv: nn.Conv2d) -> str:
    if conv.dilation != (1, 1) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise RefusedError(" has dilation, a padding mode or a padding by name")
    kernel, stride = conv.kernel_size, conv.stride
    if conv.groups == 1:
        return POINTWISE if kernel == stride == (1, 1) and conv.padding == (0, 0) else DENSE
    if conv.groups != conv.in_channels or conv.groups != conv.out_channels:
        raise RefusedError(" is a grouped convolution")
    if kernel[0] != kernel[1] or kernel[0] % 2 == 0 or stride not in ((1, 1), (2, 2)):
        raise RefusedError(f" has kernel {kernel} and stride {stride}")
    return DEPTHWISE


# Members are read from the modules' own tables: nn.Module.__getattr__ is slow.
def _conv_members(conv: nn.Module) -> tuple[Any, Any]:
    """Weight and bias of a convolution."""
    table = conv.__dict__["_parameters"]
    weight, bias = table.get("weight", _MISSING), table.get("bias", _MISSING)
    if type(weight) not in PLAIN:
        raise _refuse_tensor("weight")
    if bias is not None and type(bias) not in PLAIN:
        raise _refuse_tensor("bias")
    return weight, bias


def _bn_members(bn: nn.Module, channels: int) -> tuple[Any, Any, Any, Any]:
    """Weight, bias, mean and variance of a BatchNorm."""
    state = bn.__dict__
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


def _layer(module: nn.Module) -> Layer:
    """Takes a Conv2dNormActivation apart."""
    if type(module) is not layers.Conv2dNormActivation:
        raise RefusedError(f" is {type(module).__name__}, not Conv2dNormActivation")
    children = module.__dict__["_modules"]
    if tuple(children) not in (("0", "1"), ("0", "1", "2")):
        raise RefusedError(f" has children {list(children)}")
    conv, bn, act = children["0"], children["1"], children.get("2", _MISSING)
    child = "0"
    try:
        require(conv, *CONVOLUTIONS)
        weight, bias = _conv_members(conv)
        if bias is not None:
            raise RefusedError(" has a bias")
        shape = (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
        if weight.shape != shape:
            raise RefusedError(f".weight has shape {list(weight.shape)}, not {list(shape)}")
        child = "1"
        require(bn, nn.BatchNorm2d)
        vectors = _bn_members(bn, conv.out_channels)
        child = "2"
        if act is not _MISSING:
            require(act, nn.SiLU)
        child = "0"
        kind = _conv_kind(conv)
    except RefusedError as refused:
        raise RefusedError(f".{child}{refused}") from None
    if kind != POINTWISE and act is _MISSING:
        raise RefusedError(" has no activation")
    return Layer(kind, conv, bn, act is not _MISSING, module, (weight, *vectors))


_SQUEEZE_KINDS = {
    "avgpool": nn.AdaptiveAvgPool2d,
    "fc1": nn.Conv2d,
    "fc2": nn.Conv2d,
    "activation": nn.SiLU,
    "scale_activation": nn.Sigmoid,
}
_SQUEEZE_NAMES = tuple(_SQUEEZE_KINDS)


def _check_squeeze(module: nn.Module, channels: int) -> tuple[Any, Any, Any, Any]:
    """Weight and bias of fc1 and of fc2."""
    require(module, layers.SqueezeExcitation)
    children = module.__dict__["_modules"]
    if tuple(children) != _SQUEEZE_NAMES:
        raise RefusedError(f" has children {list(children)}")
    key = ""
    try:
        for key, kind in _SQUEEZE_KINDS.items():
            require(children[key], kind)
        hidden = children["fc1"].out_channels
        tensors: list[Any] = []
        shapes = {"fc1": (hidden, channels, 1, 1), "fc2": (channels, hidden, 1, 1)}
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
    reduce_weight, reduce_bias, expand_weight, expand_bias = tensors
    return reduce_weight, reduce_bias, expand_weight, expand_bias


_BLOCK_CHILDREN = (("0", "1", "2"), ("0", "1", "2", "3"))


def _block(module: layers.MBConv) -> Block:
    """Takes an MBConv apart."""
    own = module.__dict__["_modules"]
    name, block = "block", own.get("block")
    try:
        require(block, nn.Sequential)
        name = "stochastic_depth"
        require(own.get("stochastic_depth"), layers.StochasticDepth)
        name = "block"
        children = block.__dict__["_modules"]
        if tuple(children) not in _BLOCK_CHILDREN:
            raise RefusedError(f" has children {list(children)}")
        for key, child in children.items():
            name = key
            refuse_hooks(child)
        *first, second, third, last = children
        expand = None
        for name in first:
            expand = _layer(children[name])
        name = second
        depthwise = _layer(children[name])
        channels = depthwise.conv.out_channels
        name = third
        squeeze = children[name]
        excite = _check_squeeze(squeeze, channels)
        name = last
        project = _layer(children[name])
    except RefusedError as refused:
        place = name if name in ("block", "stochastic_depth") else f"block.{name}"
        raise RefusedError(f"{place}{refused}") from None
    if expand and (expand.kind != POINTWISE or expand.conv.out_channels != channels):
        raise RefusedError("block.0 is not the pointwise layer before the depthwise one")
    if depthwise.kind != DEPTHWISE or project.kind != POINTWISE or project.silu:
        raise RefusedError("block is not expand, depthwise, squeeze-excite, project")
    if project.conv.in_channels != channels:
        raise RefusedError(f"block.{last} does not take {channels} channels")
    return Block(expand, depthwise, squeeze, excite, project)


def structure_of(module: nn.Module) -> Layer | Block:
    """The module's fused form.

    Raises:
        RefusedError: it has none, with the reason.
    """
    _refuse_global_hooks()
    if type(module) is layers.MBConv:
        return _block(module)
    try:
        return _layer(module)
    except RefusedError as refused:
        raise RefusedError(f"{type(module).__name__}{refused}") from None
