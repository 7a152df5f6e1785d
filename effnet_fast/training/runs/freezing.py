"""Which layers are trained, and the constants of their BatchNorms."""

from __future__ import annotations

from torch.nn.modules.batchnorm import _BatchNorm

from effnet_fast.models import EfficientNet
from effnet_fast.training.runs.recipe import ALL_STAGES, Recipe


def apply(model: EfficientNet, recipe: Recipe) -> None:
    """Freezes the first layers as the recipe says, and sets the momentum of BatchNorms.

    Raises:
        ValueError: more stages than the network has.
    """
    if recipe.freeze:
        stages = None if recipe.freeze == ALL_STAGES else recipe.freeze
        model.freeze(stages, bn=recipe.freeze_bn)
    if recipe.bn_momentum is not None:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = recipe.bn_momentum


def resolution_of(epoch: int, recipe: Recipe, resolution: int) -> int:
    """Side of an epoch's training images, pixels: a multiple of 8, but for the last."""
    if not recipe.progressive or recipe.epochs == 1 or epoch >= recipe.epochs - 1:
        return resolution
    share = epoch / (recipe.epochs - 1)
    side = recipe.progressive + share * (resolution - recipe.progressive)
    return max(8, round(side / 8) * 8)
