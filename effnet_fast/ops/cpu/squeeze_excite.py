"""Squeeze-and-excite on the CPU's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effnet_fast.backends import native
from effnet_fast.ops.registration import BF16, addresses, empty_nhwc, isa_of, native_layers, nhwc
from effnet_fast.ops.squeeze_excite import empty_excite, empty_grads
from effnet_fast.reference.activations import kernel_activation, kernel_gate


def excite(pooled: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The registered op."""
    *parameters, activation, gate_kind, backend = rest
    hidden, gate = empty_excite(pooled, *rest)
    if pooled.numel() == 0:
        return hidden.zero_(), gate
    n, c = pooled.shape
    layers, at = native_layers(parameters)
    native.load().excite(
        isa_of(backend), n, c, hidden.shape[1], layers[0].dtype is BF16,
        pooled.data_ptr(), *at, hidden.data_ptr(), gate.data_ptr(), kernel_activation(activation),
        kernel_gate(gate_kind), torch.get_num_threads(),
    )  # fmt: skip
    return hidden, gate


def _pixels(x: Tensor) -> tuple[int, int, int]:
    n, c, h, w = x.shape
    return n, c, h * w


def squeeze_excite(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The registered op."""
    backend = rest[-1]
    y, pooled = empty_nhwc(x, x.shape), x.new_empty(x.shape[:2], dtype=torch.float32)
    extension, isa, sizes = native.load(), isa_of(backend), _pixels(x)
    bf16, threads = x.dtype is BF16, torch.get_num_threads()
    x = nhwc(x)
    if x.numel():
        extension.squeeze(
            isa, *sizes, bf16, x.data_ptr(), 0, 1.0 / sizes[2], pooled.data_ptr(), threads
        )
    else:
        pooled.zero_()
    hidden, gate = excite(pooled, *rest)
    if x.numel():
        extension.gate(isa, *sizes, bf16, x.data_ptr(), gate.data_ptr(), 0, y.data_ptr(), threads)
    return y, pooled, hidden, gate


def squeeze_excite_backward(grad_y: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The registered op."""
    reduce_weight, expand_weight, pooled, hidden, gate, activation, gate_kind, backend = rest
    grads = empty_grads(grad_y, x, *rest)
    if x.numel() == 0:
        for grad in grads:
            grad.zero_()
        return grads
    extension, isa, sizes = native.load(), isa_of(backend), _pixels(x)
    bf16, threads = x.dtype is BF16, torch.get_num_threads()
    x, grad_y = nhwc(x), nhwc(grad_y)
    grad_gate, grad_pooled = torch.empty_like(pooled), torch.empty_like(pooled)
    extension.squeeze(
        isa, *sizes, bf16, x.data_ptr(), grad_y.data_ptr(), 1.0, grad_gate.data_ptr(), threads
    )
    layers, at = native_layers((reduce_weight, expand_weight))
    extension.excite_backward(
        isa, *pooled.shape, hidden.shape[1], layers[0].dtype is BF16,
        *addresses(pooled, hidden, gate, grad_gate), *at, *addresses(*grads[1:], grad_pooled),
        kernel_activation(activation), kernel_gate(gate_kind), threads,
    )  # fmt: skip
    grad_pooled /= sizes[2]
    extension.gate(
        isa, *sizes, bf16, grad_y.data_ptr(), gate.data_ptr(), grad_pooled.data_ptr(),
        grads[0].data_ptr(), threads,
    )  # fmt: skip
    return grads
