"""Parameter groups whose learning rate falls with the distance from the output.

Source: Bao et al., "BEiT" (arXiv 2106.08254), appendix; param_groups_layer_decay in
timm/optim/_param_groups.py, https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection
from typing import Any, Protocol


class Grouped(Protocol):
    """A network that knows its parameters' depth."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]: ...

    def named_parameters(self) -> Any: ...


def layer_of_parameters(model: Grouped) -> dict[str, int]:
    """Depth of each parameter: 0 for the stem, one more for every block, then the classifier."""
    matcher = model.group_matcher()
    stem = re.compile(matcher["stem"])
    block, head = (re.compile(pattern) for pattern, _ in matcher["blocks"])

    def place(name: str) -> tuple[float, ...]:
        if stem.match(name):
            return (0,)
        if match := block.match(name):
            return (1, *map(int, match.groups()))
        return (1, math.inf) if head.match(name) else (2,)

    places = {name: place(name) for name, _ in model.named_parameters()}
    ranks: dict[tuple[float, ...], int] = {}
    for key in sorted(set(places.values())):
        follows = key == (1, math.inf) and ranks  # the last convolution belongs to the last block
        ranks[key] = max(ranks.values(), default=-1) + (0 if follows else 1)
    return {name: ranks[key] for name, key in places.items()}


def param_groups(
    model: Grouped,
    lr: float,
    weight_decay: float = 0.05,
    *,
    layer_decay: float = 0.75,
    min_scale: float = 0.0,
    no_weight_decay: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Groups that hold each trainable parameter once, ready for a torch.optim optimiser.

    A layer at depth i of L has lr * max(min_scale, layer_decay ** (L - 1 - i)); the classifier's
    is lr. Biases and norms (all 1-D parameters) have no weight decay. Parameters that do not
    require gradients are left out.

    Args:
        model: an `EfficientNet` or `EfficientNetFeatures`.
        lr: learning rate of the last layer.
        weight_decay: of all other parameters.
        layer_decay: ratio of a layer's rate to that of the layer after it, in (0, 1].
        min_scale: least ratio to `lr`.
        no_weight_decay: names of further parameters without weight decay; may have wildcards.

    Returns:
        Dicts of params, lr, weight_decay and name, from the stem on.

    Raises:
        ValueError: a number outside its range.
    """
    if not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"layer_decay must be above 0 and at most 1, got {layer_decay!r}")
    if not 0.0 <= min_scale <= 1.0:
        raise ValueError(f"min_scale must be between 0 and 1, got {min_scale!r}")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    layers = layer_of_parameters(model)
    last = max(layers.values(), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim > 1 and not any(fnmatch.fnmatch(name, p) for p in no_weight_decay)
        layer = layers[name]
        scale = max(min_scale, layer_decay ** (last - layer))
        group = groups.setdefault(
            (layer, plain),
            {
                "params": [],
                "lr": lr * scale,
                "weight_decay": weight_decay if plain else 0.0,
                "name": f"layer_{layer}_{'decay' if plain else 'no_decay'}",
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
