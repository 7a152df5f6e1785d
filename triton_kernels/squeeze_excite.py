"""Squeeze-and-excite: sums over an image's pixels, two small layers, the gate; and backward.

Computes: pooled = mean over H, W of x, and for x = act(bn(z)) also S3 = sum of act'(u) and
          S4 = sum of act'(u) * zh; hidden = W1 pooled + b1, gate = sigmoid(W2 act(hidden) + b2),
          y = x * gate; backward the sums of x * grad_y and
          grad_x = grad_y * gate + grad_pooled / (H * W); act is SiLU or clamp(lo, hi), the
          sigmoid perhaps hard
Shapes:   x/z/y [N,C,H,W], pooled/gate [N,C], hidden [N,R], W1 [R,C], W2 [C,R]
Dtypes:   x/z/y fp32|fp16|bf16, parameters any; vectors over (n, c) and accumulation fp32, the
          layers' products IEEE
Layout:   channels_last without gaps; vectors and weights without gaps
Tiling:   sums: a program owns RUN pixels of an image and BC channels; layers: BI x BJ outputs
Bytes:    the sums read x once, the gate reads x and writes y; the layers read their weights once
          per BI images
FLOPs:    2 per element, about 20 with BN and SiLU; 4 * N * R * C for the layers
Source:   Hu et al. (arXiv 1709.01507), equations 2 to 4
Truth:    effnet_fast/reference/squeeze_excite.py
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .bn_act import image_of, tile_of
from .elementwise import (
    activated,
    activated_with_slope,
    gate_of,
    grad_through,
    grad_through_gate,
    load_norm,
    load_vector,
)
from .folds import fold_sums
from .launching import (
    activation_constants,
    dense,
    empty_fp32,
    empty_nhwc,
    launch,
    nhwc,
    units,
)


@triton.jit(do_not_specialize=["pixels", "channel_units", "RUN"])
def squeeze_kernel(
    x, grad, partial, norm, lo, hi, pixels, channel_units, RUN,
    VEC: tl.constexpr, FIELDS: tl.constexpr, ACT: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """partial [N,runs,F,C]: sums of x; of x * grad; or of act(u), act'(u), act'(u) * zh."""
    channels = channel_units * VEC
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    c_inside = c < channels
    n = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, BP)
    total = tl.zeros([BP, BC], tl.float32)
    if norm is not None:
        scale, shift, mean, rstd = load_norm(norm, channels, c, c_inside)
        slope_total = tl.zeros([BP, BC], tl.float32)
        product_total = tl.zeros([BP, BC], tl.float32)
    for begin in range(0, RUN, BP):
        first = tl.program_id(0) * RUN + begin
        inside = (row < pixels - first)[:, None] & c_inside[None, :]
        at = row[:, None] * channels + c[None, :]
        start = (n * pixels + first) * channels
        value = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32)
        if norm is not None:
            u = value * scale[None, :] + shift[None, :]
            a, slope = activated_with_slope(u, lo, hi, ACT)
            slope = tl.where(inside, slope, 0.0)
            total += tl.where(inside, a, 0.0)
            slope_total += slope
            product_total += tl.where(
                inside, slope * ((value - mean[None, :]) * rstd[None, :]), 0.0
            )
        else:
            if grad is not None:
                value *= tl.load(grad + start + at, mask=inside, other=0.0).to(tl.float32)
            total += value
    out = partial + (n * tl.num_programs(0) + tl.program_id(0)) * FIELDS * channels + c
    tl.store(out, tl.sum(total, 0), mask=c_inside)
    if norm is not None:
        tl.store(out + channels, tl.sum(slope_total, 0), mask=c_inside)
        tl.store(out + 2 * channels, tl.sum(product_total, 0), mask=c_inside)


@triton.jit(do_not_specialize=["rows", "pixels", "channel_units"])
def gate_kernel(
    x, gate, offset, y, rows, pixels, channel_units,
    VEC: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y = x * gate[n, c] + offset[n, c]."""
    channels = channel_units * VEC
    first, row, c, row_inside, c_inside = tile_of(rows, channels, BP, BC)
    inside = row_inside[:, None] & c_inside[None, :]
    at = first * channels + row[:, None] * channels + c[None, :]
    vector_at = image_of(first, row, pixels)[:, None] * channels + c[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(gate + vector_at, mask=inside, other=0.0)
    if offset is not None:
        value += tl.load(offset + vector_at, mask=inside, other=0.0)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def excite_operand(value, kind: tl.constexpr, other, lo, hi, ACT: tl.constexpr, GATE: tl.constexpr):
    """An operand as its product takes it: itself, act(it), or its gradient through a gate."""
    value = value.to(tl.float32)
    if kind == "activated":
        value = activated(value, lo, hi, ACT)
    if kind == "gate_grad":
        value = grad_through_gate(value, other, GATE)
    return value


@triton.jit(do_not_specialize=[
    "out_i", "out_j", "inner", "a_i", "a_k", "b_k", "b_j",
])  # fmt: skip
def excite_kernel(
    a, a_gate, b, bias, hidden, out, row_sums, lo, hi,
    out_i, out_j, inner, a_i, a_k, b_k, b_j,
    A_KIND: tl.constexpr, B_KIND: tl.constexpr, GATED: tl.constexpr,
    ACT: tl.constexpr, GATE: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [I,J] = a [I,K] b [K,J] + bias [J], made a gate, or times act'(hidden [I,J]).

    a_gate is laid out like a; row_sums [I], where given, are the sums of a over K.
    """
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    acc = tl.zeros([BI, BJ], tl.float32)
    total = tl.zeros([BI], tl.float32)
    for k0 in range(0, inner, BK):
        k = k0 + tl.arange(0, BK)
        a_inside = (i < out_i)[:, None] & (k < inner)[None, :]
        a_at = i[:, None] * a_i + k[None, :] * a_k
        a_value = tl.load(a + a_at, mask=a_inside, other=0.0)
        gate = 0.0
        if a_gate is not None:
            gate = tl.load(a_gate + a_at, mask=a_inside, other=0.0)
        a_value = excite_operand(a_value, A_KIND, gate, lo, hi, ACT, GATE)
        b_inside = (k < inner)[:, None] & (j < out_j)[None, :]
        b_value = tl.load(b + k[:, None] * b_k + j[None, :] * b_j, mask=b_inside, other=0.0)
        b_value = excite_operand(b_value, B_KIND, 0.0, lo, hi, ACT, GATE)
        acc = tl.dot(a_value, b_value, acc, input_precision="ieee")
        total += tl.sum(a_value, 1)
    inside = (i < out_i)[:, None] & (j < out_j)[None, :]
    at = i[:, None] * out_j + j[None, :]
    acc += load_vector(bias, j, j < out_j, 0.0)[None, :]
    if GATED:
        acc = gate_of(acc, GATE)
    if hidden is not None:
        acc = grad_through(acc, tl.load(hidden + at, mask=inside, other=0.0), lo, hi, ACT)
    tl.store(out + at, acc, mask=inside)
    if row_sums is not None:
        tl.store(row_sums + i, total, mask=i < tl.where(tl.program_id(1) == 0, out_i, 0))


def launch_squeeze(
    x: Tensor,
    grad: Tensor | None = None,
    norm: Tensor | None = None,
    activation: str = "identity",
) -> Tensor:
    """Sums over the pixels of each image, fp32 [F,N,C].

    F = 1: of x, or of x * grad where grad is given. F = 3, with the norm of a BN over x = z and an
    activation: of act(u), act'(u) and act'(u) * zh.
    """
    x = nhwc(x)
    n, channels, h, w = x.shape
    fields = 1 if norm is None else 3
    config = tuning.config("squeeze", x, c=channels, m=h * w)
    runs = triton.cdiv(h * w, config["RUN"])
    partial = empty_fp32(x, n, runs, fields * channels)
    vec, channel_units = units(channels)
    act, bounds = activation_constants(activation)
    launch(
        squeeze_kernel, (runs, triton.cdiv(channels, config["BC"]), n), x.device,
        (x, None if grad is None else nhwc(grad), partial, norm, *bounds, h * w, channel_units),
        config, VEC=vec, FIELDS=fields, ACT=act,
    )  # fmt: skip
    sums = fold_sums(partial).view(n, fields, channels)
    return sums.transpose(0, 1).clone(memory_format=torch.contiguous_format)


def launch_gate(x: Tensor, gate: Tensor, offset: Tensor | None = None) -> Tensor:
    """x * gate + offset, like x [N,C,H,W]; gate and offset [N,C] fp32."""
    x = nhwc(x)
    n, channels, h, w = x.shape
    y = empty_nhwc(x, x.shape)
    config = tuning.config("bn_act", x, c=channels)
    vec, channel_units = units(channels)
    tiles = triton.cdiv(n * h * w, config["BP"]) * triton.cdiv(channels, config["BC"])
    launch(
        gate_kernel, (tiles,), x.device,
        (x, gate, offset, y, n * h * w, h * w, channel_units), config, VEC=vec,
    )  # fmt: skip
    return y


def launch_excite(
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    a_kind: str = "plain",
    b_kind: str = "plain",
    activation: str = "identity",
    gate_kind: str = "sigmoid",
    gated: bool = False,
    gate: Tensor | None = None,
    hidden: Tensor | None = None,
    row_sums: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """a [I,K] times b [K,J], any strides, in fp32: [I,J]; and the sums of a over K if asked for.

    Args:
        bias: [J], added.
        a_kind, b_kind: "plain", "activated", or (a) "gate_grad": a the gate's gradient, taken
            through it.
        activation, gate_kind: of those, of `gated` and of `hidden`.
        gated: whether the product becomes a gate in the end.
        gate: with a's strides.
        hidden: [I,J], by whose act' the product is multiplied.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    out = empty_fp32(a, rows, columns)
    sums = empty_fp32(a, rows) if row_sums else None
    assert gate is None or gate.stride() == a.stride()
    config = tuning.config("excite", out, i=rows, j=columns, k=inner)
    act, bounds = activation_constants(activation)
    launch(
        excite_kernel, (triton.cdiv(rows, config["BI"]), triton.cdiv(columns, config["BJ"])),
        a.device,
        (a, gate, b, dense(bias), hidden, out, sums, *bounds, rows, columns, inner, *a.stride(),
         *b.stride()),
        config, A_KIND=a_kind, B_KIND=b_kind, GATED=gated, ACT=act, GATE=gate_kind,
    )  # fmt: skip
    return out, sums


def excite(
    pooled: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate_kind: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The op of this name."""
    reduce, expand = reduce_weight.flatten(1), expand_weight.flatten(1)
    hidden, _ = launch_excite(pooled, reduce.t(), bias=reduce_bias)
    gate, _ = launch_excite(
        hidden, expand.t(), bias=expand_bias, a_kind="activated", activation=activation,
        gate_kind=gate_kind, gated=True,
    )  # fmt: skip
    return hidden, gate


def excite_gradients(
    grad_gate: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    gate: Tensor,
    activation: str,
    gate_kind: str,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """grad_pooled [N,C], and the gradients of both weights (2-D) and biases in their order."""
    reduce, expand = reduce_weight.flatten(1), expand_weight.flatten(1)
    grad_hidden, _ = launch_excite(
        grad_gate, expand, a_kind="gate_grad", activation=activation, gate_kind=gate_kind,
        gate=gate, hidden=hidden,
    )  # fmt: skip
    grad_expand, grad_expand_bias = launch_excite(
        grad_gate.t(), hidden, a_kind="gate_grad", b_kind="activated", activation=activation,
        gate_kind=gate_kind, gate=gate.t(), row_sums=True,
    )  # fmt: skip
    grad_reduce, grad_reduce_bias = launch_excite(grad_hidden.t(), pooled, row_sums=True)
    grad_pooled, _ = launch_excite(grad_hidden, reduce)
    assert grad_reduce_bias is not None
    assert grad_expand_bias is not None
    return grad_pooled, (grad_reduce, grad_reduce_bias, grad_expand, grad_expand_bias)


def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate_kind: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op of this name."""
    pooled = launch_squeeze(x)[0].div_(x.shape[2] * x.shape[3])
    hidden, gate = excite(
        pooled, reduce_weight, reduce_bias, expand_weight, expand_bias, activation, gate_kind,
        backend,
    )  # fmt: skip
    return launch_gate(x, gate), pooled, hidden, gate


def squeeze_excite_backward(
    grad_y: Tensor,
    x: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    gate: Tensor,
    activation: str,
    gate_kind: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op of this name."""
    grad_gate = launch_squeeze(x, grad_y)[0]
    grad_pooled, parameters = excite_gradients(
        grad_gate, reduce_weight, expand_weight, pooled, hidden, gate, activation, gate_kind
    )
    grad_pooled.div_(x.shape[2] * x.shape[3])
    return launch_gate(grad_y, gate, grad_pooled), *parameters
