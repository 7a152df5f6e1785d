"""A classifier's forward with its last convolution and the pooling as one op.

Only where nothing can see the map between the two: no hook, no other pooling, no method of one's
own, and nothing that records the operators.
"""

from __future__ import annotations

from torch import Tensor, nn

from effnet_fast.inference.parts import InferenceParts, averages_pixels, changed_step
from effnet_fast.models.backbone import Backbone
from effnet_fast.modules import fused_forward, in_turn, observed, stock, structure
from effnet_fast.modules.layers import SEQUENTIALS


def pooled_module(model: Backbone) -> nn.Module | None:
    """The last convolution's module where the network's forward pools it at once."""
    given = _walkable_parts(model)
    return given.layers[-1] if given is not None and _pooled_layer(given) else None


def _walkable_parts(model: Backbone) -> InferenceParts | None:
    """The parts, where calling the layers of features in turn is what forward does."""
    if changed_step(model):
        return None
    given = model.inference_parts()
    try:
        stock.HEAD.require()
        structure.refuse_global_hooks()
        structure.require(given.features, *SEQUENTIALS)
    except structure.RefusedError:
        return None
    return given if len(given.layers) > 1 and None not in given.layers else None


def _pooled_layer(given: InferenceParts) -> structure.Layer | None:
    pools = given.head is not None and averages_pixels(given.head)
    return fused_forward.poolable_layer(given.layers[-1]) if pools else None


def run_pooled_head(model: Backbone, x: Tensor, backend: str) -> Tensor | None:
    """A classifier's forward by that op on a backend; None where features must run as a whole."""
    if backend == "reference" or not isinstance(x, Tensor) or observed.wants_operators(x):
        return None
    given = _walkable_parts(model)
    if given is None:
        return None
    with model._execution():
        walk = in_turn.Walk(model._prepared(x))
        for layer in given.layers[:-1]:
            walk.call(layer)
        given = model.inference_parts()  # a layer's hook may have changed the head
        last = _pooled_layer(given)
        pooled = None if last is None else fused_forward.run_pooled(last, walk.last)
    assert given.head is not None
    return given.head.run(walk.result()) if pooled is None else given.head.classifier(pooled)
