"""Biases are kept, not saved: they may change between forward and backward."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from cycles import left_in_cycles
from effnet_fast import ops, reference
from effnet_fast.reference.mbconv import (
    ConvParams,
    MBConvConfig,
    MBConvParams,
    SqueezeExciteParams,
)


def vectors(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).requires_grad_() for size in sizes]


def image(*shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def squeeze_excite(module: object, x: Tensor, biases: list[Tensor]) -> Tensor:
    weights = torch.linspace(-1, 1, 24).reshape(3, 8)
    return module.squeeze_excite(x, weights, biases[0], weights.t().contiguous(), biases[1])


def pooled(module: object, x: Tensor, biases: list[Tensor]) -> Tensor:
    weight = torch.linspace(-1, 1, 64).reshape(8, 8, 1, 1)
    running = torch.zeros(8), torch.ones(8)
    return module.pointwise_bn_silu_pool(x, weight, None, biases[0], *running)


def stem(module: object, x: Tensor, biases: list[Tensor]) -> Tensor:
    weight = torch.linspace(-1, 1, 576).reshape(8, 8, 3, 3)
    running = torch.zeros(8), torch.ones(8)
    return module.stem_conv_bn_silu(x, weight, None, biases[0], *running)


def block(module: object, x: Tensor, biases: list[Tensor]) -> Tensor:
    running = torch.zeros(8), torch.ones(8)
    filters, excite, square = (torch.linspace(-1, 1, size) for size in (72, 24, 64))
    params = MBConvParams(
        None,
        ConvParams(filters.reshape(8, 1, 3, 3), None, biases[0], *running),
        SqueezeExciteParams(
            excite.reshape(3, 8, 1, 1), biases[1], excite.reshape(8, 3, 1, 1), biases[2]
        ),
        ConvParams(square.reshape(8, 8, 1, 1), None, biases[3], *running),
    )
    return module.mbconv(x, params, MBConvConfig(), training=False)


def depthwise(module: object, x: Tensor, biases: list[Tensor]) -> Tensor:
    weight = torch.linspace(-1, 1, 72).reshape(8, 1, 3, 3)
    running = torch.zeros(8), torch.ones(8)
    return module.dwconv_bn_silu(x, weight, None, biases[0], *running)


OPS = {squeeze_excite: (3, 8), pooled: (8,), depthwise: (8,), stem: (8,), block: (8, 3, 8, 8)}


@pytest.mark.parametrize("op", OPS)
def test_values_of_forward(op) -> None:
    results = []
    for module in (ops, reference):
        x, biases = image(2, 8, 5, 5), vectors(*OPS[op])
        y = op(module, x, biases).square().sum()
        with torch.no_grad():
            for bias in biases:
                bias.mul_(-3.0)
        results.append(torch.autograd.grad(y, [x, *biases]))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_gradients(op) -> None:
    """They reach the biases, and refuse those that have changed."""
    results = []
    for module in (ops, reference):
        x, biases = image(2, 8, 5, 5), vectors(*OPS[op])
        (grad,) = torch.autograd.grad(op(module, x, biases).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), biases))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    x, biases = image(2, 8, 5, 5), vectors(*OPS[op])
    y = op(ops, x, biases).square().sum()
    with torch.no_grad():
        biases[-1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, x, create_graph=True)


def test_what_a_bias_is_computed_from() -> None:
    """A bias that is no leaf has its gradient, too."""
    x, (base,) = image(2, 8, 5, 5), vectors(8)
    pooled(ops, x, [base * 2]).sum().backward()
    assert base.grad is not None


@pytest.mark.parametrize("op", OPS)
def test_backward_twice(op) -> None:
    """Of a graph that is retained, also where a bias has changed in between."""
    results = []
    for module in (ops, reference):
        x, biases = image(2, 8, 5, 5), vectors(*OPS[op])
        y = op(module, x, biases).square().sum()
        y.backward(retain_graph=True)
        with torch.no_grad():
            biases[0].add_(1.0)
        y.backward()
        results.append([t.grad for t in (x, *biases)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def step(op, differentiates: bool) -> list[weakref.ref[Tensor]]:
    """References to the biases of one step, which has ended."""
    x, biases = image(2, 8, 5, 5), vectors(*OPS[op])
    y = op(ops, x, biases).square().sum()
    if differentiates:
        y.backward()
    return [weakref.ref(bias) for bias in biases]


def test_nothing_is_left_of_a_step() -> None:
    """No cycle for the garbage collector, and the biases go with their last user."""
    steps = [(op, differentiates) for op in OPS for differentiates in (True, False)]
    assert left_in_cycles(lambda: [step(*each) for each in steps]) == []
    gc.disable()
    try:
        for op, differentiates in steps:
            assert [bias() for bias in step(op, differentiates)] == [None] * len(OPS[op])
    finally:
        gc.enable()
