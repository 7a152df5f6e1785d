"""A whole FusedMBConv as one op: a dense convolution, then a 1x1 projection or nothing.

It is an MBConv whose expansion is a dense convolution, without the depthwise one and without
squeeze-and-excite, and runs by the same passes. The product of the dense convolution is PyTorch's
or, for few input channels, the stem's. BN and activation in front of a projection are never
written to memory: saved for backward are x, the raw outputs z1 and z3, and vectors.

| pass | reads | writes |
|---|---|---|
| convolution, statistics | x, z1 | z1 |
| project, finish | z1, z3, x | z3, y |
| finish backward | dy, z3 | |
| project backward, with BN1's sums | dy, z3, z1 | e = da1, dW3 |
| dense backward | e, z1 | dz1 |
| convolution backward, data and weight | dz1, x | dx, dW1 |

Without a projection y is the activated z1 with the residual added, and e the gradient of y.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_fast.ops import scratch, second_derivative
from effnet_fast.ops.call import Call
from effnet_fast.ops.dense_conv import convolve, convolve_backward, norm_op
from effnet_fast.ops.layout import is_nhwc
from effnet_fast.ops.mbconv_passes import passes
from effnet_fast.ops.mbconv_training import (
    NO_LAYER,
    PER_LAYER,
    Vectors,
    inner_sums,
    normalised_by,
    pick,
    sums_of_images,
)
from effnet_fast.ops.norms import MEAN, VAR
from effnet_fast.ops.registration import nhwc
from effnet_fast.ops.statistics import Moves
from effnet_fast.ops.stem_conv_bn_silu import (
    backward_op,
    conv_op,
    eval_op,
    output_shape,
    silu_op,
    sums_op,
)
from effnet_fast.ops.unsaved import save_block, unpack_block

# Below so many channels of x the stem's product is taken: it is as quick as PyTorch's in fp32 and
# yields the statistics too. PyTorch's in bf16 goes to the tile unit where there is one.
OWN_CHANNELS = {torch.float32: 64, torch.bfloat16: 0}
# Of the two layers without statistics, which are biases.
_IS_BIAS = (False, False, True) * 2


class DenseLayers(NamedTuple):
    """dense, project: weight, bn_weight, bn_bias, mean, var; project is None where there is none.

    dense: weight [C,Cin,K,K]; project: weight [Cout,C,1,1].
    """

    dense: tuple[Any, ...]
    project: tuple[Any, ...] | None

    @property
    def last(self) -> tuple[Any, ...]:
        """The layer that gives the output, but for the residual."""
        return self.project or self.dense


class Saved(NamedTuple):
    """What backward needs beside the parameters; z1 is None where it is to be computed again.

    That is in front of a projection, in a lean block. Without a projection z3 and norm3 are None.
    """

    x: Tensor
    z1: Tensor | None
    z3: Tensor | None
    norm1: Tensor
    norm3: Tensor | None
    row_scale: Tensor | None


class Needs(NamedTuple):
    """Which gradients are wanted: of x, and of each layer's weight and BatchNorm."""

    x: bool
    dense: tuple[bool, ...]
    project: tuple[bool, ...]


class Grads(NamedTuple):
    """As `Needs`; None for what is not wanted. Without a projection it has none."""

    x: Tensor | None
    dense: Vectors
    project: Vectors


def _is_own(x: Tensor) -> bool:
    """Whether the stem's product is taken."""
    return x.shape[1] < OWN_CHANNELS[x.dtype]


def _convolution(x: Tensor, layer: tuple[Any, ...], eps: float, call: Call) -> tuple[Tensor, Any]:
    """z1 and its norm, by the statistics of the layer where it has any."""
    if _is_own(x):
        z, norm = conv_op(x, *layer, call.stride, call.padding, eps, call.backend)
        return z, norm
    z = convolve(x, layer[0], call.stride, call.padding)
    return z, norm_op(z, *layer[1:], eps, call.backend)


def _rows(row_scale: Tensor, like: Tensor) -> Tensor:
    return row_scale.to(like.dtype).reshape(-1, 1, 1, 1)


def _finish_dense(y: Tensor, row_scale: Tensor | None, residual: Tensor | None) -> Tensor:
    """y * row_scale [N] + residual, in place."""
    if row_scale is not None:
        y.mul_(_rows(row_scale, y))
    return y if residual is None else y.add_(residual)


def forward(
    x: Tensor, row_scale: Tensor | None, layers: DenseLayers, call: Call
) -> tuple[Tensor, Saved]:
    """y [N,Cout,Ho,Wo] of x [N,Cin,H,W], NHWC without gaps, and what backward needs."""
    first, last = call.norms[0], call.norms[-1]
    z1, norm1 = _convolution(x, normalised_by(layers.dense, first.training), first.eps, call)
    if first.exchange:
        norm1 = first.exchange.merge(norm1, z1, first.eps, *layers.dense[1:3])
    if layers.project is not None:
        run = passes(call.backend)
        project = normalised_by(layers.project, last.training)
        z3, norm3 = run.project(z1, norm1, None, *project, last.eps, call.activation)
        if last.exchange:
            norm3 = last.exchange.merge(norm3, z3, last.eps, *layers.project[1:3])
        y = run.finish(z3, norm3, row_scale, x if call.residual else None)
        return y, Saved(x, z1, z3, norm1, norm3, row_scale)
    y = silu_op(z1, norm1, call.activation, call.backend)
    y = _finish_dense(y, row_scale, x if call.residual else None)
    return y, Saved(x, z1, None, norm1, None, row_scale)


def _again(saved: Saved, layers: DenseLayers, call: Call) -> Tensor:
    """z1, computed from x once more where it was not saved."""
    if saved.z1 is not None:
        return saved.z1
    layer = (*layers.dense[:2], None, saved.norm1[MEAN], saved.norm1[VAR])  # z1 needs no bias
    return _convolution(saved.x, layer, call.norms[0].eps, call)[0]


def _project_backward(
    grad_y: Tensor, z1: Tensor, saved: Saved, layers: DenseLayers, call: Call, needs: Needs
) -> tuple[Tensor, Tensor | None, Vectors]:
    """da1, the sums of BN1's gradient where da1 is wanted, and the projection's gradients."""
    if layers.project is None or saved.z3 is None or saved.norm3 is None:
        da = grad_y if saved.row_scale is None else grad_y * _rows(saved.row_scale, grad_y)
        return da, sums_op(da, z1, saved.norm1, call.activation, call.backend), ()
    run, wanted = passes(call.backend), needs.x or any(needs.dense)
    sums3 = run.finish_backward(grad_y, saved.row_scale, saved.z3, saved.norm3)
    inner = inner_sums(call.norms[-1], sums3, saved.norm3, wanted or needs.project[0])
    e, sums, grad_weight = run.project_backward(
        grad_y, saved.row_scale, saved.z3, saved.norm3, inner, layers.project[0],
        z1, saved.norm1, None, [wanted, needs.project[0]], call.activation,
    )  # fmt: skip
    grads = pick(needs.project, grad_weight, sums3[1], sums3[0])
    return e, sums_of_images(sums) if wanted else None, grads


def backward(grad_y: Tensor, saved: Saved, layers: DenseLayers, call: Call, needs: Needs) -> Grads:
    """The gradients; passes that nothing wanted depends on are left out."""
    z1 = _again(saved, layers, call)
    da, sums1, project = _project_backward(grad_y, z1, saved, layers, call, needs)
    if sums1 is None:
        return Grads(None, (None,) * 3, project)
    grad_x = grad_weight = None
    if needs.x or needs.dense[0]:
        inner = inner_sums(call.norms[0], sums1, saved.norm1, True)
        dz = backward_op(da, z1, saved.norm1, inner, call.activation, call.backend)
        grad_x, grad_weight = convolve_backward(
            dz, saved.x, layers.dense[0], call.stride, call.padding, (needs.x, needs.dense[0])
        )
    if grad_x is not None and call.residual:
        grad_x.add_(grad_y)
    return Grads(grad_x, pick(needs.dense, grad_weight, sums1[1], sums1[0]), project)


def _layers(tensors: tuple[Any, ...]) -> DenseLayers:
    """The layers from the flat list that an autograd Function takes."""
    dense, project = tensors[:PER_LAYER], tensors[PER_LAYER:]
    return DenseLayers(dense, project if project[0] is not None else None)


def _like(grad: Tensor | None, tensor: Tensor, is_last: bool) -> Tensor | None:
    """The gradient in the dtype of its tensor, and a weight's in PyTorch's layout of it."""
    if grad is None:
        return None
    grad = grad.to(tensor.dtype)
    if grad.dim() != 4:
        return grad
    return nhwc(grad) if is_last or is_nhwc(tensor) else grad.contiguous()


def _laid_out(saved: Saved) -> Saved:
    """All in the layout that they were saved in: hooks on saved tensors may change it."""
    images: Any = (None if z is None else nhwc(z) for z in saved[:3])
    vectors: Any = (None if v is None else v.contiguous() for v in saved[3:])
    return Saved(*images, *vectors)


class FusedMBConv(torch.autograd.Function):
    """Returns (y, norm1, norm3); the latter are [5,C], norm3 None without a projection."""

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
        y, saved = forward(nhwc(x), row_scale, layers, call)
        if move is not None:
            move(saved.norm1, saved.norm3)
        if call.memory == "lean" and layers.project is not None:
            saved = saved._replace(z1=None)
        # Without running statistics, which may move before backward: it reads norms.
        given = *tensors[:3], *tensors[PER_LAYER : PER_LAYER + 3]
        save_block(ctx, saved, given, _IS_BIAS)
        ctx.call, ctx.is_last = call, is_nhwc(x)
        norms = [norm for norm in (saved.norm1, saved.norm3) if norm is not None]
        ctx.mark_non_differentiable(*norms)
        return y, saved.norm1, saved.norm3

    @staticmethod
    @second_derivative.differentiable(second_derivative.fused_mbconv)
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        call = ctx.call
        tensors, parameters = unpack_block(ctx, len(Saved._fields), ctx.biases)
        saved = _laid_out(Saved(*tensors))
        layers = DenseLayers(parameters[:3], None if parameters[3] is None else parameters[3:])
        flags = ctx.needs_input_grad
        needs = Needs(flags[0], flags[4:7], flags[4 + PER_LAYER : 7 + PER_LAYER])
        with scratch.scope():
            grads = backward(nhwc(grad_y), saved, layers, call, needs)
        is_last, none = ctx.is_last, (None, None)
        grad_x = grads.x
        if grad_x is not None and not (is_last or is_nhwc(parameters[0])):
            grad_x = grad_x.contiguous()
        flat = (*grads.dense, *(grads.project or (None,) * 3))
        like = [_like(g, t, is_last) for g, t in zip(flat, parameters, strict=True)]
        return grad_x, None, None, None, *like[:3], *none, *like[3:], *none


def apply(x: Tensor, row_scale: Tensor | None, layers: DenseLayers, call: Call) -> Tensor:
    """The op on checked arguments; x [N,Cin,H,W] in any layout, y channels_last."""
    between = output_shape(x, layers.dense[0], call.stride, call.padding)
    out = (between[0], layers.last[0].shape[0], *between[2:])
    batches: Any = [(call.norms[0], layers.dense, between)]
    if layers.project is not None:
        batches.append((call.norms[1], layers.project, out))
    if call.infers and layers.project is None and _is_own(x):
        rest = call.stride, call.padding, call.norms[0].eps, call.activation, call.backend
        return _finish_dense(
            eval_op(x, *layers.dense, *rest), row_scale, x if call.residual else None
        )
    move = Moves(*batches)
    if call.needs_grad:
        flat = *layers.dense, *(layers.project or NO_LAYER)
        y, *norms = FusedMBConv.apply(x, row_scale, call, move if move.inside else None, *flat)
        if move.inside:
            return y
    else:
        y, saved = forward(nhwc(x), row_scale, layers, call)
        norms = [saved.norm1, saved.norm3]
    move(*norms)
    return y
