"""The fused forward of a module, where `structure` knows its children.

What is not recognised goes down the module's stock path, which is right and slower; `explain` says
why. A backend named by the caller raises where it cannot run on this input; what keeps a module's
structure from being fused never does.

Tracing (torch.compile, torch.export, FX, TorchScript) and torch.func see the stock path, so that
what they capture consists of PyTorch's own operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effnet_fast import backends
from effnet_fast.modules import (
    dense_block,
    in_turn,
    observed,
    recognition,
    repetition,
    structure,
    sync_batch_norm,
)
from effnet_fast.modules.dense_block import DenseBlock, Found
from effnet_fast.modules.recognition import Recognised
from effnet_fast.modules.repetition import Choice
from effnet_fast.modules.stochastic_depth import ELEMENTS, drop, row_scale
from effnet_fast.modules.structure import Block
from effnet_fast.ops import synced_dwconv
from effnet_fast.ops.call import wants_gradient
from effnet_fast.ops.dwconv_bn_silu import apply as dwconv_bn_silu
from effnet_fast.ops.fused_mbconv import DenseLayers
from effnet_fast.ops.fused_mbconv import apply as fused_mbconv
from effnet_fast.ops.layout import is_nhwc, makes_nhwc, to_nchw, to_nhwc
from effnet_fast.ops.mbconv import apply as mbconv
from effnet_fast.ops.mbconv_training import Layers
from effnet_fast.ops.pointwise_bn_act import eval_op as pointwise_bn_act_eval
from effnet_fast.ops.pointwise_bn_silu_pool import apply as pointwise_bn_silu_pool
from effnet_fast.ops.registration import autocast
from effnet_fast.ops.stem_conv_bn_silu import apply as stem_conv_bn_silu

POOLED = "pointwise_bn_silu_pool"  # the op of a layer that is pooled at once


class Input(NamedTuple):
    """Images as an op takes them."""

    x: Tensor  # [N,Cin,H,W], cast where autocast is on, in a layout that the op takes
    backend: str  # that runs the op
    is_nhwc: bool  # whether PyTorch takes what was given for channels_last


def _input(found: Found, op: str, x: Tensor, backend: str, decided: dict[Any, Any]) -> Input | None:
    """What the op takes of x and the backend that runs it; None for the stock path.

    Args:
        decided: backends that were chosen for inputs of a kind, see `recognition.Recognised`.
    """
    if x.dim() != 4:
        return None  # stock raises PyTorch's own error
    cast, autocasts = autocast(x)
    if cast.dtype is not x.dtype and not isinstance(found, structure.Layer) and found.promotes:
        return None  # a sum with x is of x's dtype
    is_last = is_nhwc(x)
    first = found.first
    if cast.shape[1] != first.conv.in_channels:
        return None
    if not autocasts and first.tensors[0].dtype is not cast.dtype:  # those of a block have one
        return None  # stock raises here too
    # All that a choice depends on beside the module.
    size = cast.shape[0], cast.numel() == 0, is_last and cast.stride(1)
    kind = (op, backend, cast.dtype, cast.device, type(cast), size)
    chosen = decided.get(kind)
    if chosen is None:
        asked = cast if is_last else cast[:0]  # no images: of any layout
        args = found.op_args(asked, inference=True)
        assert args is not None
        chosen = decided[kind] = backends.choose(backend, op, args)
    if chosen == "reference":
        return None
    # A dense convolution's kernels take images in any layout.
    keeps = is_last or found.first.kind == structure.DENSE
    return Input(cast if keeps else to_nhwc(cast), chosen, is_last)


def _fits(layer: structure.Layer, given: Input) -> bool:
    """Whether x with its padding is as large as the kernel."""
    geometry, (height, width) = layer.geometry, given.x.shape[2:]
    if height >= geometry.kernel[0] and width >= geometry.kernel[1]:
        return True
    return min(geometry.out_size(height, width)) >= 1


def _gives_nhwc(found: Found, given: Input) -> bool:
    """Whether stock's result is channels_last."""
    return given.is_nhwc or makes_nhwc(structure.weights_of(found.layers))


def _run_spatial(layer: structure.Layer, given: Input) -> Tensor | None:
    """The depthwise op or the stem's, with the module's own bookkeeping of its BatchNorm.

    None where several processes have to meet within an op of a backend.
    """
    if layer.kind != structure.DENSE and layer.syncs:
        if not synced_dwconv.runs_on(given.backend):
            return None
        return synced_dwconv.apply(given.x, layer.tensors, layer.begin_call(given.x, given.backend))
    op = stem_conv_bn_silu if layer.kind == structure.DENSE else dwconv_bn_silu
    return op(given.x, layer.tensors, layer.begin_call(given.x, given.backend))


def _run_pointwise(layer: structure.Layer, given: Input) -> Tensor | None:
    """The 1x1 convolution's op; None in training and for a gradient, which it does not know."""
    x, backend = given.x, given.backend
    if layer.by_batch or wants_gradient(x, *layer.tensors):
        return None
    return pointwise_bn_act_eval(
        x, *layer.tensors, None, None, layer.bn.eps, layer.activation, backend
    )


def _run_block(block: Block, given: Input, x: Tensor) -> Tensor | None:
    """The block, with its modules' own bookkeeping; x is the input before autocast.

    None where a padding that was made for larger images does not make these as large as the kernel.
    """
    if not _fits(block.depthwise, given):
        return None
    expand, depthwise, project = block.expand, block.depthwise, block.project
    layers = Layers(
        expand.tensors if expand else None, depthwise.tensors, block.excite, project.tensors
    )
    call = block.begin_call(given.x, given.backend)
    dropped = block.residual and block.drop_probability != 0
    if dropped and (call.infers or block.drop_mode == ELEMENTS):
        y = mbconv(given.x, None, layers, call._replace(residual=False))
        if block.drop_mode == ELEMENTS and not _gives_nhwc(block, given):
            y = to_nchw(y)  # numbers are drawn in the order of memory, which is stock's then
        y = drop(y, block.drop_probability, block.drop_mode)
        y += x
        return y
    return mbconv(given.x, _row_scale(block, given.x), layers, call)


def _run_dense_block(block: DenseBlock, given: Input) -> Tensor | None:
    """The block; None on a backend that has no kernel for it: its layers have ops of their own."""
    if dense_block.obstacle(given.backend) or not _fits(block.dense, given):
        return None
    call = block.begin_call(given.x, given.backend)
    project = block.project.tensors if block.project else None
    return fused_mbconv(
        given.x, _row_scale(block, given.x), DenseLayers(block.dense.tensors, project), call
    )


def _row_scale(block: Block | DenseBlock, x: Tensor) -> Tensor | None:
    """The factor [N] that drop-path gives each image's body; None where it drops nothing."""
    if not block.residual or block.drop_probability == 0:
        return None
    return row_scale(x, block.drop_probability, block.drop_mode)


def run(module: Any, x: Tensor, *arguments: Any) -> Tensor:
    """The module's forward: fused where its structure, the backend and x allow it, else stock.

    Args:
        arguments: what forward takes beside x.

    Returns:
        y [N,Cout,Ho,Wo] of x [N,Cin,H,W], what `module.forward_stock` gives up to rounding, in
        its layout too unless `in_turn` hides y.

    Raises:
        RuntimeError: a backend named by the caller cannot run on x, with the reason.
    """
    if torch.compiler.is_compiling():
        return module.forward_stock(x, *arguments)
    choices = repetition.thread
    first = repetition.first_choice(module) if choices.repeated else None
    if first is not None:
        recognised = first.found and recognition.Recognised(first.found, {})
        backend = first.backend
    else:
        backend = backends.module_backend()
        is_stock = backend == "reference" or observed.wants_operators(x)
        recognised = None if is_stock else _recognise(module, *arguments)
    y = None if recognised is None else _run_fused(recognised, x, backend)
    if choices.recorded is not None:
        found = None if y is None or recognised is None else recognised.found
        choices.recorded.append(Choice(module, found, backend))
    if y is not None:
        return y
    with sync_batch_norm.served(module, x):
        return module.forward_stock(x, *arguments)


def _recognise(module: nn.Module, *arguments: Any) -> Recognised | None:
    try:
        return recognition.recognise(module, *arguments)
    except structure.RefusedError:
        return None


def _run_fused(recognised: Recognised, x: Tensor, backend: str) -> Tensor | None:
    """The fused forward; None for the stock path, which may raise PyTorch's own error."""
    found, decided = recognised
    given = _input(found, found.op, x, backend, decided)
    if given is None:
        return None
    y: Tensor | None = None
    if isinstance(found, Block):
        y = _run_block(found, given, x)
    elif isinstance(found, DenseBlock):
        y = _run_dense_block(found, given)
    elif found.kind == structure.POINTWISE:
        y = _run_pointwise(found, given)
    elif _fits(found, given):
        y = _run_spatial(found, given)
    if y is None or given.is_nhwc or in_turn.is_hidden() or _gives_nhwc(found, given):
        return y
    return to_nchw(y)


def run_layer(read: Callable[[], structure.Layer], x: Tensor) -> Tensor | None:
    """The forward of a layer that is no module of its own; None for its modules in turn.

    Args:
        read: takes it apart, or raises RefusedError.

    Raises:
        RuntimeError: a backend named by the caller cannot run on x, with the reason.
    """
    backend = "reference" if observed.wants_operators(x) else backends.module_backend()
    if backend == "reference":
        return None
    try:
        found = read()
    except structure.RefusedError:
        return None
    return _run_fused(Recognised(found, {}), x, backend)


def run_pooled(found: structure.Layer, x: Tensor) -> Tensor | None:
    """The mean over H and W [N,Cout] of a layer's forward on x [N,Cin,H,W], never written itself.

    None where no kernel does it: the module's own forward then does.

    Raises:
        RuntimeError: a backend named by the caller cannot run on x, with the reason.
    """
    backend = "reference" if observed.wants_operators(x) else backends.module_backend()
    given = None if backend == "reference" else _input(found, POOLED, x, backend, {})
    if given is None or 0 in x.shape[2:]:
        return None
    call = found.begin_call(given.x, given.backend)
    return pointwise_bn_silu_pool(given.x, found.tensors, call)
