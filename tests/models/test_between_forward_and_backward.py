"""What happens to saved tensors between forward and backward, against torchvision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from networks import MINI, assert_alike, pair, random_images

X = random_images(3, 32)


def is_bias(name: str) -> bool:
    return name.endswith("bias")


def grads(
    model: nn.Module, between: Callable[[nn.Module], object], x: Tensor, create_graph: bool = False
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    y = model(x).square().mean()
    with torch.no_grad():
        between(model)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(y, [x, *parameters], create_graph=create_graph)
    return dict(zip(("grad x", *(f"grad {n}" for n in names)), found, strict=True))


def step_biases(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_bias(name):
            parameter.add_(1.0)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_biases_may_change(memory: str, training: bool) -> None:
    """The gradients are those of the values in forward."""
    models = pair(MINI).train(training)
    models.actual.memory = memory
    assert_alike(*(grads(model, step_biases, X) for model in models.models))
    assert_alike(*(grads(model.features[2][0], step_biases, stem()) for model in models.models))
    layers = [model.features[2][0].block[1] for model in models.models]
    x = torch.randn(3, layers[0][0].in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    assert_alike(*(grads(layer, step_biases, x) for layer in layers))


def stem() -> Tensor:
    channels = pair(MINI).stock.features[2][0].block[0][0].in_channels
    return torch.randn(3, channels, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [n for n, _ in pair(MINI).stock.named_parameters()])
def test_weights_may_not(name: str) -> None:
    """As in stock PyTorch, which is right to refuse: backward reads them."""
    if is_bias(name) or name == "classifier.1.weight":
        return
    for model in pair(MINI).train().models:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            grads(model, lambda m: m.get_parameter(name).add_(1.0), X)


def test_a_second_derivative_wants_the_bias() -> None:
    model = pair(MINI).train().actual
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: a bias \[\d+\]"):
        grads(model, step_biases, X, create_graph=True)
    grads(model, lambda m: None, X, create_graph=True)


def spread(tensor: Tensor) -> Tensor:
    """Equal values with gaps in between."""
    return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)[..., 0]


def reverse(tensor: Tensor) -> Tensor:
    """Equal values in the opposite order of dimensions."""
    order = [*reversed(range(tensor.dim()))]
    return tensor.permute(order).contiguous().permute(order)


@pytest.mark.parametrize("unpack", [spread, reverse])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_unpack_hooks_may_change_strides(
    training: bool, unpack: Callable[[Tensor], Tensor]
) -> None:
    models = pair(MINI).train(training)
    layer = models.actual.features[2][0].block[1]
    layer_x = torch.randn(3, layer[0].in_channels, 8, 8)
    for module, x in ((models.actual, X), (layer, layer_x)):
        expected = grads(module, lambda m: None, x)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            assert_alike(grads(module, lambda m: None, x), expected)
            grads(module, lambda m: None, x, create_graph=True)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_statistics_with_a_negative_bit(training: bool) -> None:
    """Stock PyTorch leaves those in peace: its batch_norm moves a copy."""

    def negate(model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for index, norm in enumerate(norms):
            if index % 3 != 1:
                norm.running_mean = torch._neg_view(-norm.running_mean)
            if index % 3 != 2:
                norm.running_var = torch._neg_view(-norm.running_var)

    models = pair(MINI).train(training).apply(negate)
    models.assert_alike(X)
    models.assert_alike(X, backward=False)
    assert models.actual.features[0][1].running_mean.is_neg()
