"""The stem as a layer of a network: its convolution may have strides that the op cannot say."""

from __future__ import annotations

import copy

import torch
from torch import nn

from effnet_fast import use_backend
from effnet_fast.modules.explain import explain
from effnet_fast.modules.layers import Conv2dNormActivation
from parity import assert_parity, channels_last


def check_oblong_stride(backend: str, training: bool) -> None:
    """Holds a layer with stride 2 over rows and 1 over columns to the rule of parity."""
    actual = Conv2dNormActivation(3, 16, 3, stride=2, activation_layer=nn.SiLU).train(training)
    actual[0].stride = (2, 1)
    stock, exact = copy.deepcopy(actual), copy.deepcopy(actual).double()
    x = channels_last(torch.randn(2, 3, 9, 12))
    with use_backend(backend):
        assert explain(actual) is None
        results = [_step(actual, x)]
    with use_backend("reference"):
        results += [_step(stock, x), _step(exact, x.double())]
    assert results[0]["y"].shape == (2, 16, 5, 12)
    assert_parity(*results, torch.float32)


def _step(layer: Conv2dNormActivation, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * y.detach().cos()).sum().backward()
    grads = {f"grad {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "grad x": x.grad, **grads}
