"""Whether a module's children may be replaced by fused ops, and the fused forward itself.

The children are read at each call. Whatever is not recognised exactly - a hook, a replaced or
parametrised layer, a patched forward - sends that module down its stock path, which is right and
slower. `explain` says why. A backend named by the caller raises where it cannot run on this input;
what keeps a module's structure from being fused never does.

Tracing (torch.compile, torch.export, FX, TorchScript) and torch.func see the stock path, so that
what they capture consists of PyTorch's own operators.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from . import backends, layers
from .ops.dwconv_bn_silu import apply as dwconv_bn_silu
from .ops.mbconv import eval_op as mbconv_eval
from .ops.pointwise_bn_act import eval_op as pointwise_bn_act_eval
from .ops.registration import autocast
from .ops.squeeze_excite import apply as squeeze_excite
from .ops.stem_conv_bn_silu import eval_op as stem_conv_bn_silu_eval

_PLAIN = (Tensor, nn.Parameter)
_DENSE, _DEPTHWISE, _POINTWISE = "dense", "depthwise", "pointwise"
_OPS = {
    _DENSE: "pointwise_bn_act",
    _DEPTHWISE: "dwconv_bn_silu",
    _POINTWISE: "pointwise_bn_act",
}


class RefusedError(Exception):
    """A module that is not what the fused path knows; the text is the reason."""


class Layer(NamedTuple):
    """A convolution with its BatchNorm, and whether a SiLU follows."""

    kind: str
    conv: nn.Conv2d
    bn: nn.BatchNorm2d
    silu: bool
    module: nn.Module


class Block(NamedTuple):
    """The layers of an MBConv."""

    expand: Layer | None
    depthwise: Layer
    squeeze: layers.SqueezeExcitation
    project: Layer


def _refuse_hooks(name: str, module: nn.Module) -> None:
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        raise RefusedError(f"{name} has a hook")
    if "forward" in module.__dict__:
        raise RefusedError(f"{name} has a patched forward")


def _refuse_global_hooks() -> None:
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        raise RefusedError("a global module hook is registered")


def _require(name: str, module: nn.Module | None, kind: type) -> None:
    if type(module) is not kind:
        raise RefusedError(f"{name} is {type(module).__name__}, not {kind.__name__}")
    assert module is not None
    _refuse_hooks(name, module)


def _conv_kind(name: str, conv: nn.Conv2d) -> str:
    if conv.bias is not None:
        raise RefusedError(f"{name} has a bias")
    if conv.dilation != (1, 1) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise RefusedError(f"{name} has dilation, a padding mode or a padding by name")
    if type(conv.weight) not in _PLAIN:
        raise RefusedError(f"{name}.weight is {type(conv.weight).__name__}")
    kernel, stride = conv.kernel_size, conv.stride
    if conv.groups == 1:
        return _POINTWISE if kernel == stride == (1, 1) and conv.padding == (0, 0) else _DENSE
    if conv.groups != conv.in_channels or conv.groups != conv.out_channels:
        raise RefusedError(f"{name} is a grouped convolution")
    if kernel[0] != kernel[1] or kernel[0] % 2 == 0 or stride not in ((1, 1), (2, 2)):
        raise RefusedError(f"{name} has kernel {kernel} and stride {stride}")
    return _DEPTHWISE


def _check_bn(name: str, bn: nn.BatchNorm2d, channels: int) -> None:
    vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    if any(v is not None and type(v) not in _PLAIN for v in vectors):
        raise RefusedError(f"{name} holds a tensor of another type")
    if (bn.running_mean is None) != (bn.running_var is None):
        raise RefusedError(f"{name} has one of its two running statistics")
    if any(v is not None and v.shape != (channels,) for v in vectors):
        raise RefusedError(f"{name} does not have {channels} channels")


def _layer(name: str, module: nn.Module) -> Layer:
    """Takes a Conv2dNormActivation apart."""
    if type(module) is not layers.Conv2dNormActivation:
        raise RefusedError(f"{name} is {type(module).__name__}, not Conv2dNormActivation")
    children = list(module._modules.items())
    if [key for key, _ in children] not in (["0", "1"], ["0", "1", "2"]):
        raise RefusedError(f"{name} has children {[key for key, _ in children]}")
    conv, bn = children[0][1], children[1][1]
    _require(f"{name}.0", conv, nn.Conv2d)
    _require(f"{name}.1", bn, nn.BatchNorm2d)
    if len(children) == 3:
        _require(f"{name}.2", children[2][1], nn.SiLU)
    assert isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d)
    kind = _conv_kind(f"{name}.0", conv)
    _check_bn(f"{name}.1", bn, conv.out_channels)
    if kind != _POINTWISE and len(children) == 2:
        raise RefusedError(f"{name} has no activation")
    return Layer(kind, conv, bn, len(children) == 3, module)


def _check_squeeze(name: str, module: nn.Module, channels: int) -> None:
    _require(name, module, layers.SqueezeExcitation)
    children = module._modules
    kinds = {
        "avgpool": nn.AdaptiveAvgPool2d,
        "fc1": nn.Conv2d,
        "fc2": nn.Conv2d,
        "activation": nn.SiLU,
        "scale_activation": nn.Sigmoid,
    }
    if list(children) != list(kinds):
        raise RefusedError(f"{name} has children {list(children)}")
    for key, kind in kinds.items():
        _require(f"{name}.{key}", children[key], kind)
    pool, fc1, fc2 = children["avgpool"], children["fc1"], children["fc2"]
    assert isinstance(pool, nn.AdaptiveAvgPool2d)
    assert isinstance(fc1, nn.Conv2d) and isinstance(fc2, nn.Conv2d)
    if pool.output_size not in (1, (1, 1)):
        raise RefusedError(f"{name}.avgpool pools to {pool.output_size}")
    hidden = fc1.out_channels
    for key, conv, shape in (
        ("fc1", fc1, (hidden, channels, 1, 1)),
        ("fc2", fc2, (channels, hidden, 1, 1)),
    ):
        if conv.weight.shape != shape or conv.stride != (1, 1) or conv.padding != (0, 0):
            raise RefusedError(f"{name}.{key} is not a 1x1 convolution of {channels} channels")
        tensors = (conv.weight, conv.bias)
        if any(t is not None and type(t) not in _PLAIN for t in tensors):
            raise RefusedError(f"{name}.{key} holds a tensor of another type")


def _block(module: layers.MBConv) -> Block:
    """Takes an MBConv apart."""
    block = module.block
    _require("block", block, nn.Sequential)
    _require("stochastic_depth", module.stochastic_depth, layers.StochasticDepth)
    children = list(block._modules.values())
    if len(children) not in (3, 4) or list(block._modules) != [
        str(i) for i in range(len(children))
    ]:
        raise RefusedError(f"block has children {list(block._modules)}")
    for i, child in enumerate(children):
        _refuse_hooks(f"block.{i}", child)
    first = len(children) - 3
    expand = _layer("block.0", children[0]) if first else None
    depthwise = _layer(f"block.{first}", children[first])
    project = _layer(f"block.{first + 2}", children[first + 2])
    squeeze = children[first + 1]
    channels = depthwise.conv.out_channels
    _check_squeeze(f"block.{first + 1}", squeeze, channels)
    if expand and (expand.kind != _POINTWISE or expand.conv.out_channels != channels):
        raise RefusedError("block.0 is not the pointwise layer before the depthwise one")
    if depthwise.kind != _DEPTHWISE or project.kind != _POINTWISE or project.silu:
        raise RefusedError("block is not expand, depthwise, squeeze-excite, project")
    if project.conv.in_channels != channels:
        raise RefusedError(f"block.{first + 2} does not take {channels} channels")
    return Block(expand, depthwise, squeeze, project)  # type: ignore[arg-type]


def _structure(module: nn.Module) -> Layer | Block:
    """The module's fused form.

    Raises:
        RefusedError: it has none, with the reason.
    """
    _refuse_global_hooks()
    if type(module) is layers.MBConv:
        return _block(module)
    return _layer(type(module).__name__, module)


def explain(module: nn.Module) -> str | None:
    """Why the module would run unfused under the current backend; None where it is fused.

    Args:
        module: an MBConv or a Conv2dNormActivation; others are never fused.
    """
    backend = backends.current_backend()
    if backend == "reference":
        return 'the backend is "reference"'
    if reason := backends.can_run("cpu" if backend == "auto" else backend, "dwconv_bn_silu"):
        return reason
    try:
        _structure(module)
    except RefusedError as refused:
        return str(refused)
    return None


def _captured(x: Tensor) -> bool:
    """Whether something records the operators instead of running them on plain tensors."""
    return (
        type(x) not in _PLAIN
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or backends.in_transform()
    )


def _backend_for(first: Layer, x: Tensor) -> str | None:
    """The backend that runs a module whose first layer sees x; None for the stock path."""
    name = backends.current_backend()
    if name == "reference" or _captured(x) or x.dim() != 4:
        return None
    if x.shape[1] != first.conv.in_channels:
        return None  # stock raises PyTorch's own error
    probe = backends.OpArgs(autocast(x), (first.conv.weight,), inference=True)
    chosen = backends.resolve(name, _OPS[first.kind], probe)
    return None if chosen == "reference" else chosen


def _needs_grad(x: Tensor, *modules: nn.Module) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(p.requires_grad for m in modules for p in m.parameters())


def _uses_batch_statistics(bn: nn.BatchNorm2d) -> bool:
    return bn.training or bn.running_mean is None


def _tensors(layer: Layer) -> tuple[Tensor | None, ...]:
    """(weight, bn_weight, bn_bias, mean, var)."""
    bn = layer.bn
    return layer.conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var


def _padding(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    assert not isinstance(conv.padding, str)
    top, left = conv.padding
    return left, left, top, top


def _run_depthwise(layer: Layer, x: Tensor, backend: str) -> Tensor:
    """The depthwise op with the module's own bookkeeping of its BatchNorm."""
    conv, bn = layer.conv, layer.bn
    momentum = 0.0 if bn.momentum is None else bn.momentum
    tracked = bn.track_running_stats if bn.training else True
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    return dwconv_bn_silu(
        autocast(x), conv.weight, bn.weight, bn.bias,
        bn.running_mean if tracked else None, bn.running_var if tracked else None,
        conv.stride[0], _padding(conv), _uses_batch_statistics(bn), momentum, bn.eps, backend,
    )[0]  # fmt: skip


def _run_layer(layer: Layer, x: Tensor, backend: str) -> Tensor:
    if layer.kind == _DEPTHWISE:
        return _run_depthwise(layer, x, backend)
    if not _infers(x, layer):
        return layer.module.forward_stock(x)  # type: ignore[operator]
    conv, bn = layer.conv, layer.bn
    if layer.kind == _DENSE:
        return stem_conv_bn_silu_eval(
            autocast(x), *_tensors(layer),
            conv.stride, conv.padding, bn.eps, backend,
        )  # fmt: skip
    return pointwise_bn_act_eval(
        autocast(x), *_tensors(layer), None, None, layer.silu, bn.eps, backend
    )


def _infers(x: Tensor, layer: Layer) -> bool:
    return not (_uses_batch_statistics(layer.bn) or _needs_grad(x, layer.conv, layer.bn))


def _run_block(module: layers.MBConv, block: Block, x: Tensor, backend: str) -> Tensor:
    expand, depthwise, squeeze, project = block
    fc1, fc2 = squeeze.fc1, squeeze.fc2
    parameters = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    infers = all(_infers(x, layer) for layer in (expand, depthwise, project) if layer)
    if infers and not _needs_grad(x, squeeze):
        dropped = module.stochastic_depth.training and module.stochastic_depth.p > 0
        y = mbconv_eval(
            autocast(x), _tensors(expand) if expand else [], _tensors(depthwise), parameters,
            _tensors(project), depthwise.conv.stride[0], _padding(depthwise.conv),
            [expand.bn.eps if expand else 0.0, depthwise.bn.eps, project.bn.eps],
            module.use_res_connect and not dropped, backend,
        )  # fmt: skip
        return module.add_residual(y, x) if dropped else y
    h = x if expand is None else _run_layer(expand, x, backend)
    h = _run_depthwise(depthwise, h, backend)
    h = squeeze_excite(h, *parameters, backend)
    y = _run_layer(project, h, backend)
    return module.add_residual(y, x)


def run(module: layers.Conv2dNormActivation | layers.MBConv, x: Tensor) -> Tensor:
    """The module's forward: fused where its structure, the backend and x allow it, else stock.

    Args:
        module: whose forward this is.
        x: [N,Cin,H,W].

    Returns:
        y [N,Cout,Ho,Wo], what `module.forward_stock(x)` gives up to rounding.

    Raises:
        RuntimeError: a backend named by the caller cannot run on x, with the reason.
    """
    if torch.jit.is_scripting() or backends.current_backend() == "reference":  # type: ignore[attr-defined]
        return module.forward_stock(x)
    try:
        structure = _structure(module)
    except RefusedError:
        return module.forward_stock(x)
    if isinstance(structure, Layer):
        backend = _backend_for(structure, x)
        return module.forward_stock(x) if backend is None else _run_layer(structure, x, backend)
    backend = _backend_for(structure.expand or structure.depthwise, x)
    if backend is None:
        return module.forward_stock(x)
    assert isinstance(module, layers.MBConv)
    return _run_block(module, structure, x, backend)
