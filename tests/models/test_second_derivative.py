"""Gradients of gradients through the fused network: right, never constants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import networks
from networks import pair, random_images, trio

X = random_images(3, 48)


def gradient_penalty(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """As in WGAN-GP (arXiv 1704.00028, equation 3): gradients of (|grad_x y| - 1)^2."""
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x)[:, :3].sum(), x, create_graph=True)
    penalty = (grad.flatten(1).norm(dim=1) - 1).square().mean()
    penalty.backward()
    grads = {f"grad {k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"y": penalty.detach(), "grad x": x.grad} | grads


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradient_penalty(training: bool) -> None:
    models = trio().train(training)
    for model in models.models:  # drop-path draws differ in float64
        for module in model.modules():
            if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
                module.p = 0.0
    actual, stock = (gradient_penalty(m, X) for m in (models.actual, models.stock))
    assert actual["grad features.1.0.block.0.0.weight"].abs().max() > 0
    networks.assert_alike(actual, stock)
    exact = gradient_penalty(models.exact, X.double())
    assert networks.rms(actual["grad x"] - exact["grad x"]) <= 3 * networks.rms(
        stock["grad x"] - exact["grad x"]
    ) + 1e-5 * networks.rms(exact["grad x"])


@pytest.mark.slow
def test_hessian_vector_product() -> None:
    products = []
    for model in pair().models:
        x = X.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        products.append({"y": torch.autograd.grad(grad, x, torch.ones_like(grad))[0]})
    networks.assert_alike(*products)


def test_with_gradient_checkpointing() -> None:
    models = pair().train()
    models.actual.set_grad_checkpointing()
    networks.assert_alike(*(gradient_penalty(m, X) for m in models.models))


def test_frozen_stages() -> None:
    models = pair().train()
    models.actual.freeze(4)
    models.stock.features[:5].requires_grad_(False)
    for module in models.stock.features[:5].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    networks.assert_alike(*(gradient_penalty(m, X) for m in models.models))


@pytest.mark.slow
def test_third_derivative() -> None:
    thirds = []
    for model in pair().models:
        x = X.clone().requires_grad_()
        y = model(x).square().sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(y, x, create_graph=True)
            y = grad.square().sum()
        thirds.append({"y": y.detach()[None]})
    networks.assert_alike(*thirds)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_batches_of_gradients(training: bool) -> None:
    """As in torch.autograd.functional.jacobian(vectorize=True)."""
    models, results = pair().train(training), []
    for model in models.models:
        for module in model.modules():
            if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
                module.p = 0.0
        x = X.clone().requires_grad_()
        y = model(x)[:, :3].sum(0)
        (batch,) = torch.autograd.grad(y, x, torch.eye(3), retain_graph=True, is_grads_batched=True)
        rows = [torch.autograd.grad(part, x, retain_graph=True)[0] for part in y]
        results.append({"grad x": batch, "one by one": torch.stack(rows)})
    networks.assert_alike(*results)
