"""Squeeze-and-excite on the CUDA kernels, and an MBConv's squeeze."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effnet_fast.ops.cuda import statistics
from effnet_fast.ops.cuda.launching import DTYPES, Bn, launchers, queue, scratch
from effnet_fast.ops.registration import address, dense, empty_nhwc, native_layers, nhwc
from effnet_fast.ops.squeeze_excite import empty_excite, empty_grads, empty_squeeze_excite
from effnet_fast.reference.activations import kernel_activation, kernel_gate

# Channels of a part of the first layer: one block's, which its threads go through in steps of 256.
LEAST_CHANNELS, MOST_CHANNELS = 256, 1024
ROWS, IMAGES = 4, 4  # of the first layer's hidden channels and of a batch, of a block
BLOCKS = 2 * 132  # of the first layer, where the shape has them: two on a multiprocessor
SIDE = 32  # channels of a block in backward


def squeeze(z: Tensor, bn: Bn, activation: str, backend: str) -> Tensor:
    """[3,N,C] of z [N,C,H,W] and u = bn(z): mean act(u), sum act'(u), sum act'(u) * zh."""
    factor = 1.0 / (z.shape[2] * z.shape[3])
    return statistics.image_sums(
        backend, statistics.SQUEEZE, z, bn=bn, factor=factor, activation=activation
    )


def splits_of(n: int, c: int, r: int) -> int:
    """Parts of C in the first layer: few images and hidden channels give few blocks otherwise."""
    blocks = -(-r // ROWS) * -(-n // IMAGES)
    least, most = -(-c // MOST_CHANNELS), -(-c // LEAST_CHANNELS)
    return min(max(-(-BLOCKS // blocks), least), most)


def excite(pooled: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The registered op: hidden [N,R] as its product is and gate [N,C] of pooled [N,C], in fp32."""
    *parameters, activation, gate_kind, backend = rest
    pooled = dense(pooled, torch.float32)
    hidden, gate = empty_excite(pooled, *rest)
    if pooled.numel() == 0:
        return hidden.zero_(), gate
    n, c = pooled.shape
    r = hidden.shape[1]
    splits = splits_of(n, c, r)
    layers, at = native_layers(parameters, DTYPES)
    partial = scratch(pooled, splits, n, r)
    launchers(backend).excite_fwd(
        queue(pooled), (n, c, r, splits), DTYPES[layers[0].dtype],
        pooled.data_ptr(), *at,
        partial.data_ptr(), hidden.data_ptr(), gate.data_ptr(),
        kernel_activation(activation), kernel_gate(gate_kind),
    )  # fmt: skip
    return hidden, gate


def excite_backward(
    grad_gate: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    gate: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    factor: float,
    activation: str,
    gate_kind: str,
    backend: str,
    *,
    grad_sums: Tensor | None = None,
    squeeze_sums: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the two layers and of what was pooled.

    Args:
        grad_gate, pooled, gate: [N,C]; hidden [N,R]; all fp32 without gaps.
        factor: 1 / (H * W).
        activation, gate_kind: of hidden, and what makes the gate.
        grad_sums, squeeze_sums: [2,N,C] for BatchNorm's gradients in an MBConv: sums of
            e * act'(u) and e * act'(u) * zh, and the latter two of `squeeze`.

    Returns:
        gradients of reduce_weight [R,C], its bias [R], expand_weight [C,R], its bias [C]; that of
        each pixel that was pooled [N,C]; with the sums BatchNorm's bias and weight [2,C]. All fp32.
    """
    n, c = pooled.shape
    r = hidden.shape[1]
    layers, at = native_layers((reduce_weight, expand_weight), DTYPES)
    partial = scratch(pooled, -(-c // SIDE), n, r)
    grad_hidden, grad_pooled = torch.empty_like(hidden), torch.empty_like(pooled)
    grads = (
        scratch(pooled, r, c), scratch(pooled, r), scratch(pooled, c, r), scratch(pooled, c)
    )  # fmt: skip
    grad_bn = None if grad_sums is None else scratch(pooled, 2, c)
    launchers(backend).excite_bwd(
        queue(pooled), (n, c, r), DTYPES[layers[0].dtype],
        pooled.data_ptr(), hidden.data_ptr(), gate.data_ptr(), grad_gate.data_ptr(),
        *at, partial.data_ptr(), grad_hidden.data_ptr(),
        tuple(grad.data_ptr() for grad in grads), grad_pooled.data_ptr(), factor,
        address(grad_sums), address(squeeze_sums), address(grad_bn),
        kernel_activation(activation), kernel_gate(gate_kind),
    )  # fmt: skip
    return (*grads, grad_pooled, grad_bn)


def apply_gate(x: Tensor, gate: Tensor, shift: Tensor | None, y: Tensor, backend: str) -> Tensor:
    """Writes x * gate + shift to y, both [N,C,H,W] NHWC without gaps; gate and shift [N,C] fp32."""
    n, c, h, w = x.shape
    launchers(backend).gate(
        queue(x), (n, c, h * w), DTYPES[x.dtype],
        x.data_ptr(), gate.data_ptr(), address(shift), y.data_ptr(),
    )  # fmt: skip
    return y


def squeeze_excite(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The registered op."""
    backend = rest[-1]
    if x.numel() == 0:
        y, pooled, hidden, gate = empty_squeeze_excite(x, *rest)
        return y, pooled, hidden.zero_(), gate
    x, y = nhwc(x), empty_nhwc(x, x.shape)
    factor = 1.0 / (x.shape[2] * x.shape[3])
    pooled = statistics.image_sums(backend, statistics.SUM, x, factor=factor)[0]
    hidden, gate = excite(pooled, *rest)
    return apply_gate(x, gate, None, y, backend), pooled, hidden, gate


def squeeze_excite_backward(grad_y: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The registered op."""
    reduce_weight, expand_weight, pooled, hidden, gate, activation, gate_kind, backend = rest
    if x.numel() == 0:
        grads = empty_grads(grad_y, x, *rest)
        for grad in grads:
            grad.zero_()
        return grads
    x, grad_y = nhwc(x), nhwc(grad_y)
    grad_gate = statistics.image_sums(backend, statistics.PRODUCT, x, grad_y)[0]
    *of_layers, grad_pooled, _ = excite_backward(
        grad_gate, pooled, hidden, gate, reduce_weight, expand_weight,
        1.0 / (x.shape[2] * x.shape[3]), activation, gate_kind, backend,
    )  # fmt: skip
    grad_x = empty_nhwc(x, x.shape)
    return apply_gate(grad_y, gate, grad_pooled, grad_x, backend), *of_layers
