"""Gradients of an op's gradients, by name."""

from __future__ import annotations

import torch

from effnet_fast import ops
from parity import Call, Results, random_like


def second_derivatives(call: Call, backend: str, penalty: bool) -> Results:
    """Gradients, and what a gradient penalty or a product with the Hessian gives."""
    tensors = {k: v.clone() for k, v in call.tensors.items()}
    leaves = [tensors[k].requires_grad_() for k in call.differentiable]
    y = getattr(ops, call.op)(**tensors, **call.options, backend=backend)
    grad_y = random_like(y)
    first = torch.autograd.grad(y, leaves, grad_y.requires_grad_(), create_graph=True)
    targets = [*leaves, grad_y]
    if penalty:  # grad_y takes part
        scalar = first[0].square().sum().sqrt()
    else:
        scalar = sum((g * torch.linspace(-1, 1, g.numel()).view_as(g)).sum() for g in first)
    second = torch.autograd.grad(scalar, targets)
    names = [*call.differentiable, "grad_y"]
    results = {f"grad {k}": g.detach() for k, g in zip(call.differentiable, first, strict=True)}
    return results | {f"grad grad {k}": g for k, g in zip(names, second, strict=True)}
