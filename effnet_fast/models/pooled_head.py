"""A classifier's forward with its last convolution and the pooling as one op.

Only where nothing can see the map between the two: no hook, no other pooling, no method of one's
own, and nothing that records the operators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from effnet_fast import backends
from effnet_fast.inference.network_spec import METHODS, overridden
from effnet_fast.modules import fused_forward, structure

if TYPE_CHECKING:
    from effnet_fast.models.efficientnet import EfficientNet


def _stands(model: EfficientNet) -> bool:
    """Whether features and pooling are what the class built, with no hook on either."""
    pool = model.avgpool
    try:
        structure.require(model.features, nn.Sequential)
        structure.require(pool, nn.AdaptiveAvgPool2d)
    except structure.RefusedError:
        return False
    unpatched = METHODS.isdisjoint(model.__dict__) and not overridden(model, METHODS - {"forward"})
    return (
        unpatched
        and len(model.features) > 1
        and model.global_pool == "avg"
        and pool.output_size in (1, (1, 1))
    )


def pooled_layer(model: EfficientNet) -> nn.Module | None:
    """The last convolution's layer where the network's forward pools it at once."""
    if not _stands(model):
        return None
    head = model.features[-1]
    return head if fused_forward.pools(head) else None


def run_pooled_head(model: EfficientNet, x: Tensor) -> Tensor | None:
    """The network's forward by that op; None where its layers must do it one by one.

    Args:
        model: an EfficientNet whose methods are the class's own.
        x: images [N,in_chans,H,W].
    """
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]  # exported implicitly
    if not isinstance(x, Tensor) or tracing:
        return None
    name = backends.current_backend() if model.backend == "auto" else model.backend
    head = None if name == "reference" else pooled_layer(model)
    if head is None:
        return None
    *layers, _ = model.features
    with model._execution():
        h = model._prepared(x)
        for layer in layers:
            h = layer(h)
        # A layer's hook may have changed the head.
        pooled = fused_forward.run_pooled(head, h) if pooled_layer(model) is head else None
    if pooled is None:
        with model._execution():
            h = head(h)
        return model.forward_head(h)
    return model.classifier(pooled)
