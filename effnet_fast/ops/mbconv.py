"""A whole MBConv as one op.

Inference: expand -> depthwise (which also pools) -> excite -> project, with the expanded tensors in
memory that the blocks of a network share. Training, and whatever needs a gradient: the passes of
`mbconv_passes`, which normalise on load, behind one autograd Function.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effnet_fast import reference
from effnet_fast.backends import OpArgs, backend_of, current_backend, launcher_of, resolve
from effnet_fast.backends.interception import are_operators_watched
from effnet_fast.ops import scratch, second_derivative
from effnet_fast.ops.call import Call, Norm, call_of
from effnet_fast.ops.dwconv_bn_silu import output_shape
from effnet_fast.ops.gate import DEPTHWISE, layer
from effnet_fast.ops.mbconv_passes import passes
from effnet_fast.ops.mbconv_training import (
    NO_LAYER,
    PER_LAYER,
    Grads,
    Layers,
    Needs,
    Saved,
    backward,
    forward,
)
from effnet_fast.ops.registration import autocast, channels_last, empty_nhwc, fp32, nhwc, register
from effnet_fast.ops.statistics import Moves
from effnet_fast.ops.unsaved import save_block, unpack_block
from effnet_fast.reference.arguments import Layer, Sides
from effnet_fast.reference.mbconv import (
    MBConvConfig,
    MBConvParams,
    SqueezeExciteParams,
    Training,
    check_arguments,
    three,
    three_modes,
)


def empty_eval(
    x: Tensor,
    expand: Layer,
    depthwise: Layer,
    excite: Layer,
    project: Layer,
    stride: int,
    padding: Sides,
    eps: list[float],
    residual: bool,
    activation: str,
    se_activation: str,
    gate_kind: str,
    backend: str,
) -> Tensor:
    """y [N,Cout,Ho,Wo], unwritten; expand and excite are empty where there is none."""
    shape = output_shape(x, depthwise[0].shape[-1], stride, padding)
    return empty_nhwc(x, (shape[0], project[0].shape[0], *shape[2:]))


eval_op = register(
    "mbconv_eval",
    empty_eval,
    {
        "x": "image NCHW inner",
        "expand": layer("EC11", "?EC"),
        "depthwise": layer("E1KK"),
        "excite": ["?EE", "floats RE*", "floats? R", "floats ER*", "floats? E"],
        "project": layer("OE11"),
        **DEPTHWISE,
        "eps": "flags 3",
        "residual": "residual",
    },
)


PER_EXCITE = 4
_NO_EXCITE = (None,) * PER_EXCITE
# Of the flat list that an autograd Function takes, which are biases.
_IS_BIAS = [place in (2, 7, 11, 13, 16) for place in range(3 * PER_LAYER + PER_EXCITE)]


def _layers(tensors: tuple[Any, ...]) -> Layers:
    """The layers from the flat list that an autograd Function takes."""
    cuts = (0, PER_LAYER, 2 * PER_LAYER, 2 * PER_LAYER + PER_EXCITE, len(tensors))
    expand, depthwise, excite, project = (
        tensors[begin:end] for begin, end in itertools.pairwise(cuts)
    )
    return Layers(
        expand if expand[0] is not None else None,
        depthwise,
        SqueezeExciteParams(*excite) if excite[0] is not None else None,
        project,
    )


def _without_statistics(layers: Layers) -> tuple[Any, ...]:
    """The flat list without running statistics, which may move before backward: it reads norms."""
    expand, depthwise, project = (
        (*layer[:3], None, None)
        for layer in (layers.expand or NO_LAYER, layers.depthwise, layers.project)
    )
    return (*expand, *depthwise, *(layers.excite or _NO_EXCITE), *project)


def _like(grad: Tensor | None, tensor: Tensor) -> Tensor | None:
    """The gradient in the shape and dtype of its tensor."""
    if grad is None:
        return None
    if grad.shape != tensor.shape:
        grad = grad.reshape(tensor.shape)
    return grad if grad.dtype is tensor.dtype else grad.to(tensor.dtype)


def _needs(flags: tuple[bool, ...]) -> Needs:
    """From the flags of x and of the flat list."""
    x, *rest = flags
    layers: Any = _layers((*rest,))
    return Needs(x, layers.expand[:3], layers.depthwise[:3], layers.excite, layers.project[:3])


def _laid_out(saved: Saved) -> Saved:
    """All in the layout that they were saved in: hooks on saved tensors may change it."""
    x, z1, z2, z3, *vectors = saved
    images = channels_last(x), None if z1 is None else nhwc(z1), nhwc(z2), nhwc(z3)
    dense: Any = (None if v is None else v.contiguous() for v in vectors)
    return Saved(*images, *dense)


def _in_one_call(call: Call, direction: str) -> Callable[..., Any] | None:
    """What runs all passes at once; None where there is nothing, or somebody sees the passes."""
    if torch.compiler.is_compiling() or are_operators_watched():
        return None
    name = f"mbconv_block_{direction}"
    if any(norm.exchange for norm in call.norms) or not backend_of(call.backend).launches(name):
        return None
    return launcher_of(call.backend, name)


def _forward(
    x: Tensor, row_scale: Tensor | None, layers: Layers, call: Call, move: Moves | None
) -> tuple[Tensor, Saved]:
    """As `mbconv_training.forward`; `move` moves the running statistics, too."""
    whole = _in_one_call(call, "forward")
    if whole is not None and (result := whole(x, row_scale, layers, call, move)) is not None:
        y, saved = result
        return y, saved
    y, saved = forward(passes(call.backend), x, row_scale, layers, call)
    if move is not None:
        move(saved.norm1, saved.norm2, saved.norm3)
    return y, saved


def _backward(grad_y: Tensor, saved: Saved, layers: Layers, call: Call, needs: Needs) -> Grads:
    """As `mbconv_training.backward`."""
    grad_y = nhwc(grad_y)
    whole = _in_one_call(call, "backward")
    if whole is not None and (grads := whole(grad_y, saved, layers, call, needs)) is not None:
        return Grads(*grads)
    return backward(passes(call.backend), grad_y, _laid_out(saved), layers, call, needs)


class MBConv(torch.autograd.Function):
    """Returns (y, norm1, norm2, norm3); the latter are [5,C], norm1 None without expansion."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        row_scale: Tensor | None,
        call: Call,
        move: Moves | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        layers = _layers(tensors)
        y, saved = _forward(x, row_scale, layers, call, move)
        if call.memory == "lean":
            saved = saved._replace(z1=None)
        save_block(ctx, saved, _without_statistics(layers), _IS_BIAS)
        ctx.call = call
        norms = (saved.norm1, saved.norm2, saved.norm3)
        ctx.mark_non_differentiable(*(norm for norm in norms if norm is not None))
        return y, *norms

    @staticmethod
    @second_derivative.differentiable(second_derivative.mbconv)
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        call = ctx.call
        tensors, parameters = unpack_block(ctx, len(Saved._fields), ctx.biases)
        flags = ctx.needs_input_grad
        needs = _needs((flags[0], *flags[4:]))
        with scratch.scope():
            grads = _backward(grad_y, Saved(*tensors), _layers(parameters), call, needs)
        none = (None, None)
        flat = (*grads.expand, *none, *grads.depthwise, *none, *grads.excite, *grads.project)
        return grads.x, None, None, None, *map(_like, (*flat, *none), parameters)


def apply(x: Tensor, row_scale: Tensor | None, layers: Layers, call: Call) -> Tensor:
    """The op on checked arguments."""
    weight = layers.depthwise[0]
    n, _, *size = output_shape(x, weight.shape[-1], call.stride[0], call.padding)
    out = (n, layers.project[0].shape[0], *size)
    if call.residual and out != tuple(x.shape):
        raise ValueError(f"a residual needs an output like x, {list(x.shape)}, not {list(out)}")
    if call.infers and row_scale is None:
        return eval_op(
            x, layers.expand or [], layers.depthwise, layers.excite or [], layers.project,
            call.stride[0], call.padding, [norm.eps for norm in call.norms], call.residual,
            call.activation, call.se_activation, call.gate, call.backend,
        )  # fmt: skip
    before, after = (n, weight.shape[0], *x.shape[2:]), (n, weight.shape[0], *size)
    batches = layers.expand, layers.depthwise, layers.project
    move = Moves(*zip(call.norms, batches, (before, after, out), strict=True))
    if call.needs_grad:
        excite = layers.excite or _NO_EXCITE
        flat = *(layers.expand or NO_LAYER), *layers.depthwise, *excite, *layers.project
        y, *norms = MBConv.apply(x, row_scale, call, move if move.inside else None, *flat)
        if move.inside:
            return y
    else:
        y, saved = _forward(x, row_scale, layers, call, move if move.inside else None)
        norms = [saved.norm1, saved.norm2, saved.norm3]
    move(*norms)
    return y


def _without_kernel(backend: str, reason: str) -> str:
    """The reference, for what it alone can do; for a named backend the error that says so."""
    named = current_backend() if backend == "auto" else backend
    if named not in ("auto", "reference"):
        raise RuntimeError(f"backend {named!r} cannot run mbconv, the reference can: {reason}")
    return "reference"


def mbconv(
    x: Tensor,
    params: MBConvParams,
    config: MBConvConfig,
    *,
    training: Training,
    row_scale: Tensor | None = None,
    memory: str = "fast",
    backend: str = "auto",
) -> Tensor:
    """y = x + row_scale * bn(project(squeeze_excite(silu(bn(depthwise(silu(bn(expand(x)))))))).

    A block may have no expansion and no squeeze-and-excitation, and another activation than SiLU.
    In training BN and activation are never written to memory: saved for backward are x, the raw
    outputs of the three convolutions, and vectors.

    Args:
        x: [N,Cin,H,W], fp32 or bf16, channels_last for the "cpu" backend. Under autocast it is cast
            as a convolution's input is.
        params: see `effnet_fast.reference.MBConvParams`; in x's dtype or fp32.
        config: see `effnet_fast.reference.MBConvConfig`.
        training: whether the BatchNorms normalise by the batch; a bool for all, or one for each of
            expansion, depthwise and projection.
        row_scale: [N] or None for 1: the factor of each image's body under drop-path. Only the
            reference computes its own gradient.
        memory: "fast", or "lean" to save one expanded tensor less and compute it again.
        backend: see `effnet_fast.use_backend`; "auto" takes the reference where no kernel fits.

    Returns:
        y [N,Cout,Ho,Wo] in x's dtype, channels_last.

    Raises:
        TypeError, ValueError: as `effnet_fast.reference.mbconv`; ValueError for an unknown backend
            too.
        RuntimeError: the backend named by the caller cannot run this call, with the reason.

    Source: Tan & Le (arXiv 1905.11946), section 4.
    """
    sides = check_arguments(x, params, config, training, row_scale, memory)
    x, _ = autocast(x)
    squeeze = params.squeeze
    tensors = (*(params.expand or ()), *params.depthwise, *(squeeze or ()), *params.project)
    kernel = (params.depthwise.weight.shape[2], params.depthwise.weight.shape[3])
    activations: tuple[str, ...] = (config.activation, config.se_activation)
    gate: str | None = config.gate
    if squeeze is None:
        activations, gate = activations[:1], None
    args = OpArgs(x, tensors, kernel, config.stride, False, activations, gate)
    chosen = resolve(backend, "mbconv", args)
    if row_scale is not None and row_scale.requires_grad and torch.is_grad_enabled():
        chosen = _without_kernel(backend, "row_scale requires a gradient, which only it gives")
    if chosen == "reference":
        return reference.mbconv(x, params, config, training=training, row_scale=row_scale)
    layers = Layers(params.expand, params.depthwise, squeeze, params.project)
    modes = zip(three_modes(training), three(config.momentum), three(config.eps), strict=True)
    norms = tuple(Norm(*mode) for mode in modes)
    stride = (config.stride, config.stride)
    call = call_of(
        norms, (x, *tensors), chosen, stride, sides, config.residual, memory,
        config.activation, config.se_activation, config.gate,
    )  # fmt: skip
    return apply(x, fp32(row_scale), layers, call)
