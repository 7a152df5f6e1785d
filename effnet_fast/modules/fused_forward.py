"""The fused forward of a module, where `structure` knows its children.

What is not recognised goes down the module's stock path, which is right and slower; `explain` says
why. A backend named by the caller raises where it cannot run on this input; what keeps a module's
structure from being fused never does.

Tracing (torch.compile, torch.export, FX, TorchScript) and torch.func see the stock path, so that
what they capture consists of PyTorch's own operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from effnet_fast import backends
from effnet_fast.modules import structure
from effnet_fast.modules.stochastic_depth import stochastic_depth
from effnet_fast.ops.dwconv_bn_silu import apply as dwconv_bn_silu
from effnet_fast.ops.mbconv import apply as mbconv
from effnet_fast.ops.mbconv import eval_op as mbconv_eval
from effnet_fast.ops.mbconv_training import Layers, Settings
from effnet_fast.ops.pointwise_bn_act import eval_op as pointwise_bn_act_eval
from effnet_fast.ops.pointwise_bn_silu_pool import apply as pointwise_bn_silu_pool
from effnet_fast.ops.registration import autocast, autocasts
from effnet_fast.ops.stem_conv_bn_silu import apply as stem_conv_bn_silu

POOLED = "pointwise_bn_silu_pool"  # the op of a layer that is pooled at once
T = TypeVar("T")
# Of the expansion, where there is one, the depthwise convolution and the projection.
Norms = tuple[nn.BatchNorm2d | None, nn.BatchNorm2d, nn.BatchNorm2d]


class Module(Protocol):
    """A module that can be run fused or, by its `forward_stock`, unfused."""

    def forward_stock(self, x: Tensor) -> Tensor: ...


def explain(module: nn.Module, op: str | None = None) -> str | None:
    """Why the module would run unfused under the current backend; None where it is fused.

    Asked for an input of its first weight's dtype and device; in eval mode, for a call that wants
    no gradient.

    Args:
        module: an MBConv or a Conv2dNormActivation; others are never fused.
        op: the op that does it, where that is not its own.
    """
    backend = backends.current_backend()
    if backend == "reference":
        return 'the backend is "reference"'
    try:
        found = structure.structure_of(module)
    except structure.RefusedError as refused:
        return str(refused)
    conv, bn = found.first.conv, found.first.bn
    x = conv.weight.new_empty((1, conv.in_channels, 1, 1))
    own, args = _question(found, autocast(x), inference=not _uses_batch_statistics(bn))
    return backends.explain(backend, op or own, args)


def _question(
    found: structure.Layer | structure.Block, x: Tensor, inference: bool
) -> tuple[str, backends.OpArgs]:
    """The op that a module is, and the call of it on x that a backend has to run."""
    if isinstance(found, structure.Block):
        op, geometry = "mbconv", found.depthwise.geometry
    else:
        op, geometry = structure.OPS[found.kind], found.geometry
        if found.kind != structure.DEPTHWISE:  # torch's own convolution: any kernel
            return op, backends.OpArgs(x, found.parameters, inference=inference)
    return op, backends.OpArgs(x, found.parameters, geometry.kernel, geometry.stride[0], inference)


def _captured(x: Tensor) -> bool:
    """Whether something records the operators instead of running them on plain tensors."""
    return type(x) not in structure.PLAIN or backends.in_transform()


def _backend_for(
    found: structure.Layer | structure.Block, x: Tensor, op: str | None = None
) -> str | None:
    """The backend that runs a module on x, by its own op or another; None for the stock path."""
    name = backends.current_backend()
    if name == "reference" or _captured(x) or x.dim() != 4:
        return None
    if x.shape[1] != found.first.conv.in_channels:
        return None  # stock raises PyTorch's own error
    own, args = _question(found, autocast(x), inference=True)
    chosen = backends.resolve(name, op or own, args)
    return None if chosen == "reference" else chosen


def _needs_grad(x: Tensor, parameters: tuple[Tensor | None, ...]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(t is not None and t.requires_grad for t in parameters)


def _uses_batch_statistics(bn: nn.BatchNorm2d) -> bool:
    return bn.training or bn.running_mean is None


def _fits(layer: structure.Layer, x: Tensor) -> bool:
    """Whether PyTorch takes x: of the weight's dtype, and with padding as large as the kernel."""
    if x.dtype is not layer.conv.weight.dtype and not autocasts(x):
        return False
    return min(layer.geometry.out_size(*x.shape[2:])) >= 1


def _run_spatial(layer: structure.Layer, x: Tensor, backend: str) -> Tensor:
    """The depthwise op or the stem's, with the module's own bookkeeping of its BatchNorm."""
    bn = layer.bn
    weight, bn_weight, bn_bias, mean, var = layer.tensors
    assert weight is not None
    momentum = _count_batch(bn)
    tracked = bn.track_running_stats if bn.training else True
    tensors = (
        autocast(x), weight, bn_weight, bn_bias,
        mean if tracked else None, var if tracked else None,
    )  # fmt: skip
    stride, padding = layer.geometry.stride, layer.geometry.sides(*x.shape[2:])
    rest = (padding, _uses_batch_statistics(bn), momentum, bn.eps, backend)
    if layer.kind == structure.DENSE:
        return stem_conv_bn_silu(*tensors, stride, *rest)
    return dwconv_bn_silu(*tensors, stride[0], *rest)[0]


def _run_layer(module: Module, layer: structure.Layer, x: Tensor, backend: str) -> Tensor:
    if layer.kind != structure.POINTWISE:
        if not _fits(layer, x):
            return module.forward_stock(x)  # raises PyTorch's own error
        return _run_spatial(layer, x, backend)
    if _uses_batch_statistics(layer.bn) or _needs_grad(x, layer.tensors):
        return module.forward_stock(x)
    return pointwise_bn_act_eval(
        autocast(x), *layer.tensors, None, None, layer.silu, layer.bn.eps, backend
    )


def _run_block(block: structure.Block, x: Tensor, backend: str) -> Tensor:
    expand, depthwise, project = block.expand, block.depthwise, block.project
    norms = (layer.bn for layer in (expand, depthwise, project) if layer)
    if any(map(_uses_batch_statistics, norms)) or _needs_grad(x, block.parameters):
        return _train_block(block, autocast(x), backend)
    dropped = block.residual and block.drop_probability > 0
    y = mbconv_eval(
        autocast(x), expand.tensors if expand else [], depthwise.tensors, block.excite,
        project.tensors, depthwise.geometry.stride[0], depthwise.geometry.sides(*x.shape[2:]),
        [expand.bn.eps if expand else 0.0, depthwise.bn.eps, project.bn.eps],
        block.residual and not dropped, backend,
    )  # fmt: skip
    if dropped:
        y = stochastic_depth(y, block.drop_probability, block.drop_mode)
        y += x
    return y


def _train_block(block: structure.Block, x: Tensor, backend: str) -> Tensor:
    """The block with gradients or batch statistics, and its modules' own bookkeeping."""
    depthwise, project = block.depthwise, block.project
    expand = block.expand.tensors if block.expand else None
    norms = (block.expand.bn if block.expand else None, depthwise.bn, project.bn)
    settings = Settings(
        depthwise.geometry.stride[0],
        depthwise.geometry.sides(*x.shape[2:]),
        block.residual,
        _of_norms(norms, lambda bn: bn.eps, 0.0),
        _of_norms(norms, _uses_batch_statistics, False),
    )
    return mbconv(
        x, _drop_path(block, x), Layers(expand, depthwise.tensors, block.excite, project.tensors),
        settings, _of_norms(norms, _count_batch, 0.0), block.memory, backend,
        _of_norms(norms, _moves, False),
    )  # fmt: skip


def _of_norms(norms: Norms, of: Callable[[nn.BatchNorm2d], T], absent: T) -> tuple[T, T, T]:
    expand, depthwise, project = norms
    return (of(expand) if expand else absent, of(depthwise), of(project))


def _drop_path(block: structure.Block, x: Tensor) -> Tensor | None:
    """The factor [N] of each image's body, drawn as the module draws it; None for 1."""
    if not block.residual or block.drop_probability == 0.0:
        return None
    ones = torch.ones(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device)
    return stochastic_depth(ones, block.drop_probability, block.drop_mode).flatten().float()


def _moves(bn: nn.BatchNorm2d) -> bool:
    """Whether the BatchNorm's running statistics are to be moved."""
    return bn.training and bn.track_running_stats


def _count_batch(bn: nn.BatchNorm2d) -> float:
    """Counts one more batch, as the module's own forward does; the momentum that it then has."""
    if _moves(bn) and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            return 1.0 / float(bn.num_batches_tracked)
    return 0.0 if bn.momentum is None else bn.momentum


def run(module: Module, x: Tensor) -> Tensor:
    """The module's forward: fused where its found, the backend and x allow it, else stock.

    Args:
        module: whose forward this is.
        x: [N,Cin,H,W].

    Returns:
        y [N,Cout,Ho,Wo], what `module.forward_stock(x)` gives up to rounding.

    Raises:
        RuntimeError: a backend named by the caller cannot run on x, with the reason.
    """
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]  # torch.jit exports it implicitly
        or backends.current_backend() == "reference"
    ):
        return module.forward_stock(x)
    try:
        found = structure.structure_of(module)  # type: ignore[arg-type]
    except structure.RefusedError:
        return module.forward_stock(x)
    backend = _backend_for(found, x)
    if backend is None:
        return module.forward_stock(x)
    if isinstance(found, structure.Layer):
        return _run_layer(module, found, x, backend)
    return _run_block(found, x, backend)


def poolable_layer(module: nn.Module) -> structure.Layer | None:
    """A module that is a 1x1 convolution with BatchNorm and SiLU, for `run_pooled`."""
    try:
        structure.refuse_hooks(module)
        found = structure.structure_of(module)
    except structure.RefusedError:
        return None
    if isinstance(found, structure.Layer) and found.kind == structure.POINTWISE and found.silu:
        return found
    return None


def run_pooled(found: structure.Layer, x: Tensor) -> Tensor | None:
    """The mean over H and W [N,Cout] of a layer's forward, whose result is never written.

    None where no kernel does it: the module's own forward then does.

    Args:
        found: of `poolable_layer`.
        x: [N,Cin,H,W].

    Raises:
        RuntimeError: a backend named by the caller cannot run on x, with the reason.
    """
    backend = _backend_for(found, x, POOLED)
    if backend is None or 0 in x.shape[2:]:
        return None
    bn = found.bn
    weight, bn_weight, bn_bias, mean, var = found.tensors
    assert weight is not None
    momentum = _count_batch(bn)
    tracked = bn.track_running_stats if bn.training else True
    return pointwise_bn_silu_pool(
        autocast(x), weight, bn_weight, bn_bias,
        mean if tracked else None, var if tracked else None,
        _uses_batch_statistics(bn), momentum, bn.eps, backend,
    )  # fmt: skip
