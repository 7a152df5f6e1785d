"""The truth of each pass of an MBConv and of the head in training, in eager PyTorch.

`effnet_fast.ops.mbconv_training.Passes` says what the passes and their symbols are. Vectors and
sums are fp32 (float64 for a float64 x).

Source: original; Ioffe & Szegedy (arXiv 1502.03167), section 3, for the gradient through BatchNorm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_fast.ops.norms import MEAN, RSTD, SCALE, SHIFT
from effnet_fast.reference.activations import activate, gate_of
from effnet_fast.reference.arguments import Sides


def _wide(x: Tensor) -> Tensor:
    """x in the dtype of sums."""
    return x if x.dtype is torch.float64 else x.float()


def _along_c(vector: Tensor) -> Tensor:
    return vector.reshape(1, -1, 1, 1)


def _per_image(values: Tensor) -> Tensor:
    return values.reshape(*values.shape, 1, 1)


def _normalised(z: Tensor, norm: Tensor) -> Tensor:
    """zh."""
    return (_wide(z) - _along_c(norm[MEAN])) * _along_c(norm[RSTD])


def _affine(z: Tensor, norm: Tensor) -> Tensor:
    """u."""
    return _wide(z) * _along_c(norm[SCALE]) + _along_c(norm[SHIFT])


def _slope(u: Tensor, activation: str) -> Tensor:
    """act'(u), by autograd of PyTorch's own function."""
    with torch.enable_grad():
        leaf = u.detach().requires_grad_()
        return torch.autograd.grad(activate(leaf, activation).sum(), leaf)[0]


def _gate_slope(gate: Tensor, kind: str) -> Tensor:
    """The derivative of the gate, given its value."""
    if kind == "sigmoid":
        return gate * (1 - gate)
    return ((gate > 0) & (gate < 1)).to(gate.dtype) / 6


def _sums(du: Tensor, z: Tensor, norm: Tensor) -> Tensor:
    dims = (0, 2, 3)
    return torch.stack([du.sum(dims), (du * _normalised(z, norm)).sum(dims)])


def _grad_z(du: Tensor, z: Tensor, norm: Tensor, sums: Tensor | None) -> Tensor:
    """dz from du; sums are None where BatchNorm does not normalise by the batch."""
    if sums is not None:
        means = sums / (z.numel() // z.shape[1])
        du = du - _along_c(means[0]) - _normalised(z, norm) * _along_c(means[1])
    return _along_c(norm[SCALE]) * du


def normalise(
    z: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> Tensor:
    """norm [5,C] of z: by its own statistics where mean and var are None."""
    wide = _wide(z)
    if mean is None or var is None:
        mean = wide.mean((0, 2, 3))
        var = (wide - _along_c(mean)).square().mean((0, 2, 3))
    mean, var = mean.to(wide.dtype), var.to(wide.dtype)
    rstd = (var + eps).rsqrt()
    scale = rstd if bn_weight is None else bn_weight.to(wide.dtype) * rstd
    shift = -mean * scale
    shift = shift if bn_bias is None else shift + bn_bias.to(wide.dtype)
    return torch.stack([scale, shift, mean, rstd, var])


def expand(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """z1 = conv(x, weight [E,Cin,1,1]), norm1."""
    z = F.conv2d(x, weight.to(x.dtype))
    return z, normalise(z, bn_weight, bn_bias, mean, var, eps)


def _activated(x: Tensor, x_norm: Tensor | None, activation: str) -> Tensor:
    return _wide(x) if x_norm is None else activate(_affine(x, x_norm), activation)


def _gated(a: Tensor, gate: Tensor | None) -> Tensor:
    return a if gate is None else a * _per_image(gate)


def _pad(x: Tensor, padding: Sides) -> Tensor:
    return F.pad(x, padding)


def depthwise(
    x: Tensor,
    x_norm: Tensor | None,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    stride: int,
    padding: Sides,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """z2 = conv_dw(a, weight [E,1,K,K]), norm2; a = act(bn(x)), or x where x_norm is None."""
    a = _pad(_activated(x, x_norm, activation), padding)
    z = F.conv2d(a, weight.to(a.dtype), None, stride, 0, groups=x.shape[1]).to(x.dtype)
    return z, normalise(z, bn_weight, bn_bias, mean, var, eps)


def squeeze(z: Tensor, norm: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """pooled [N,E] = mean a2; slopes [2,N,E] = sum act'(u2) and sum act'(u2) * zh2."""
    u = _affine(z, norm)
    slope = _slope(u, activation)
    sums = torch.stack([slope.sum((2, 3)), (slope * _normalised(z, norm)).sum((2, 3))])
    return activate(u, activation).mean((2, 3)), sums


def excite(
    pooled: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate_kind: str,
) -> tuple[Tensor, Tensor]:
    """hidden [N,R] = W1 pooled + b1, gate [N,E] = sigmoid(W2 silu(hidden) + b2), or others."""
    dtype = pooled.dtype
    biases = [None if b is None else b.to(dtype) for b in (reduce_bias, expand_bias)]
    hidden = F.linear(pooled, reduce_weight.flatten(1).to(dtype), biases[0])
    a = activate(hidden, activation)
    logits = F.linear(a, expand_weight.flatten(1).to(dtype), biases[1])
    return hidden, gate_of(logits, gate_kind)


def project(
    z2: Tensor,
    norm2: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """z3 = conv(g * a2, weight [Cout,E,1,1]), norm3."""
    a = _gated(activate(_affine(z2, norm2), activation), gate)
    z = F.conv2d(a, weight.to(a.dtype)).to(z2.dtype)
    return z, normalise(z, bn_weight, bn_bias, mean, var, eps)


def finish(z: Tensor, norm: Tensor, row_scale: Tensor | None, residual: Tensor | None) -> Tensor:
    """y = u3 * row_scale [N] + residual."""
    y = _affine(z, norm)
    if row_scale is not None:
        y = y * row_scale.reshape(-1, 1, 1, 1)
    return (y if residual is None else y + residual).to(z.dtype)


def _grad_u3(grad_y: Tensor, row_scale: Tensor | None) -> Tensor:
    du = _wide(grad_y)
    return du if row_scale is None else du * row_scale.reshape(-1, 1, 1, 1)


def finish_backward(grad_y: Tensor, row_scale: Tensor | None, z: Tensor, norm: Tensor) -> Tensor:
    """sums3 [2,Cout]."""
    return _sums(_grad_u3(grad_y, row_scale), z, norm)


def project_backward(
    grad_y: Tensor,
    row_scale: Tensor | None,
    z3: Tensor,
    norm3: Tensor,
    sums3: Tensor | None,
    weight: Tensor,
    z2: Tensor,
    norm2: Tensor,
    gate: Tensor | None,
    wanted: list[bool],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """e [N,E,H,W] = dz3 W3, sums [3,N,E], dW3; an empty tensor for what is not wanted.

    sums: sum e * a2, sum e * act'(u2), sum e * act'(u2) * zh2; wanted: e with its sums, and dW3.
    """
    dz = _grad_z(_grad_u3(grad_y, row_scale), z3, norm3, sums3)
    u = _affine(z2, norm2)
    a = activate(u, activation)
    none = a.new_empty(0)
    e, sums, grad_weight = z2.new_empty(0), none, none
    if wanted[0]:
        kernel = weight.to(dz.dtype).reshape(*weight.shape[:2], 1, 1)
        e = F.conv_transpose2d(dz, kernel).to(z2.dtype)
        wide, slope = _wide(e), _slope(u, activation)
        terms = (wide * a, wide * slope, wide * slope * _normalised(z2, norm2))
        sums = torch.stack([term.sum((2, 3)) for term in terms])
    if wanted[1]:
        grad_weight = torch.einsum("nohw,nchw->oc", dz, _gated(a, gate)).reshape(weight.shape)
    return e, sums, grad_weight


def excite_backward(
    sums: Tensor,
    slopes: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    gate: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    pixels: int,
    activation: str,
    gate_kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q [N,E] = dpooled / pixels, sums2 [2,E], and the gradients of the four parameters.

    sums [3,N,E] as `project_backward` gives them, slopes [2,N,E] as `squeeze`; pixels = H * W.
    The weights' gradients are [R,E] and [E,R].
    """
    logits = sums[0] * _gate_slope(gate, gate_kind)
    wide = [w.flatten(1).to(gate.dtype) for w in (reduce_weight, expand_weight)]
    grad_hidden = logits @ wide[1] * _slope(hidden, activation)
    q = grad_hidden @ wide[0] / pixels
    sums2 = torch.stack([(gate * sums[i + 1] + q * slopes[i]).sum(0) for i in range(2)])
    return (
        q,
        sums2,
        grad_hidden.t() @ pooled,
        grad_hidden.sum(0),
        logits.t() @ activate(hidden, activation),
        logits.sum(0),
    )


def depthwise_backward(
    e: Tensor,
    gate: Tensor | None,
    q: Tensor | None,
    z2: Tensor,
    norm2: Tensor,
    sums2: Tensor | None,
    x: Tensor,
    x_norm: Tensor | None,
    weight: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: Sides,
    wanted: list[bool],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """f [N,E,H,W], dW2, sums1 [2,E]; an empty tensor for what is not wanted.

    du2 = (e * g + q) * act'(u2). f = du1 = da1 * act'(u1); where x_norm is None it is dx, the
    residual's gradient included, without sums. wanted: f with its sums, and dW2.
    """
    da = _gated(_wide(e), gate)
    da = da if q is None else da + _per_image(q)
    du = da * _slope(_affine(z2, norm2), activation)
    dz = _grad_z(du, z2, norm2, sums2)
    a = _pad(_activated(x, x_norm, activation), padding).detach().requires_grad_()
    kernel = weight.to(a.dtype).detach().requires_grad_()
    with torch.enable_grad():
        z = F.conv2d(a, kernel, None, stride, 0, groups=x.shape[1])
    grad_a, grad_weight = torch.autograd.grad(z, [a, kernel], dz)
    none = grad_weight.new_empty(0)
    f, sums = x.new_empty(0), none
    if wanted[0]:
        left, _, top, _ = padding
        f = grad_a[:, :, top : top + x.shape[2], left : left + x.shape[3]]
        if x_norm is not None:
            f = (f * _slope(_affine(x, x_norm), activation)).to(x.dtype)
            sums = _sums(_wide(f), x, x_norm)
        elif residual is not None:
            f = f + residual
        f = f.to(x.dtype)
    return f, grad_weight if wanted[1] else none, sums


def expand_backward(
    f: Tensor,
    z1: Tensor,
    norm1: Tensor,
    sums1: Tensor | None,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """dx, the residual's gradient included, and dW1; an empty tensor for what is not wanted."""
    dz = _grad_z(_wide(f), z1, norm1, sums1)
    grad_x, grad_weight = x.new_empty(0), dz.new_empty(0)
    if wanted[0]:
        grad_x = F.conv_transpose2d(dz, weight.to(dz.dtype))
        grad_x = (grad_x if residual is None else grad_x + residual).to(x.dtype)
    if wanted[1]:
        grad_weight = torch.einsum("nchw,nihw->ci", dz, _wide(x)).reshape(weight.shape)
    return grad_x, grad_weight


def pooled_backward(
    q: Tensor,
    z: Tensor,
    norm: Tensor,
    sums: Tensor | None,
    x: Tensor,
    weight: Tensor,
    wanted: list[bool],
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The head: grad_x = dz weight, grad_weight = dz^T x; an empty tensor for what is not wanted.

    q [N,C] is the gradient of y over H * W; sums are None where BatchNorm does not normalise by
    the batch.
    """
    du = _per_image(q) * _slope(_affine(z, norm), activation)
    return expand_backward(du, z, norm, sums, x, weight, None, wanted)
