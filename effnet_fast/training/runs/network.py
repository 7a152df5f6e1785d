"""The network that a run trains, as its arguments name it, and what it remembers of the run."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from effnet_fast import models
from effnet_fast.models import EfficientNet, origin
from effnet_fast.models.loading import unfilled
from effnet_fast.models.variants import VARIANTS, Stage, Variant
from effnet_fast.pretrained import images
from effnet_fast.pretrained.weights import get_model_weights, get_weight
from effnet_fast.training.runs.recipe import Recipe

# Of published weights: DEFAULT, EfficientNet_B0_Weights.DEFAULT.
NAME = re.compile(r"[A-Z][A-Z0-9_]*|EfficientNet_\w+_Weights\.\w+")
DEFAULT_MODEL = "b0"  # where neither a model nor a file names one
LARGEST_SIDE = 1 << 16  # pixels, which a file's facts may name


def build(
    model: str | Variant | None,
    weights: str | os.PathLike[str] | None,
    recipe: Recipe,
    classes: Sequence[str],
    *,
    resolution: int | None = None,
    progress: bool = False,
    **options: Any,
) -> EfficientNet:
    """The network, its classifier for `classes`, in training mode.

    Args:
        model: a size, or a row of a table of one's own; None means that of a file of weights,
            else DEFAULT_MODEL.
        weights: None for random ones; the name of published ones; or a file or the folder of a
            run. A classifier of the same classes is kept, another one replaced.
        recipe: has dropout and drop-path.
        classes: names, in the order of the logits.
        resolution: side of the images, pixels; None means the weights' own.
        progress: shows a progress bar while downloading.
        options: further ones of `EfficientNet`: backend, memory.

    Raises:
        OSError, ValueError: as `EfficientNet.from_checkpoint` and the entry points raise.
    """
    if not isinstance(model, Variant) and model not in (None, *VARIANTS):
        raise ValueError(f"model must be one of {', '.join(VARIANTS)}, got {model!r}")
    if resolution is not None and not 1 <= resolution <= LARGEST_SIDE:
        raise ValueError(f"resolution must be between 1 and {LARGEST_SIDE}, got {resolution!r}")
    options |= _drops(recipe)
    text = None if weights is None else os.fspath(weights)
    is_new = True
    if text is None:
        network = EfficientNet(model or DEFAULT_MODEL, num_classes=len(classes), **options)
        facts = _facts(images.preset(network.variant))
    elif NAME.fullmatch(text) and not Path(text).exists():
        size = model.name if isinstance(model, Variant) else model or DEFAULT_MODEL
        network, facts, is_new = _published(size, text, classes, progress, options)
    else:
        network = EfficientNet.from_checkpoint(text, variant=model, progress=progress, **options)
        facts = _facts(images.preset(network.variant))
        is_new = network.class_names != tuple(classes)
        if is_new:
            network.reset_classifier(len(classes))
    if is_new:
        _zero_classifier(network)
    _remember(network, facts, classes, resolution)
    return network.train()


def described(network: EfficientNet) -> dict[str, Any]:
    """What `rebuild` needs beside weights, in types that need no code to be read."""
    return {"variant": asdict(network.variant), "origin": dict(network._origin)}


def rebuild(description: dict[str, Any], recipe: Recipe, **options: Any) -> EfficientNet:
    """The network of a run that is resumed, in training mode; its weights are those of a state.

    Args:
        description: of `described`; has the names of the classes, too.
        recipe, options: as for `build`.
    """
    fields = description["variant"]
    stages = tuple(Stage(**stage) for stage in fields["baseline"])
    variant = Variant(**{**fields, "baseline": stages})
    found = frozenset(description["origin"].items())
    with unfilled():
        network = EfficientNet(
            variant, num_classes=len(origin.class_names(found)), **_drops(recipe), **options
        )
    network._origin = found
    return network.to_empty(device="cpu").train()


def _drops(recipe: Recipe) -> dict[str, Any]:
    """Arguments of `EfficientNet` that the recipe gives."""
    given = {"dropout": recipe.dropout, "stochastic_depth_prob": recipe.drop_path}
    return {name: value for name, value in given.items() if value is not None}


def _zero_classifier(network: EfficientNet) -> None:
    """A new classifier that gives every class the same logit.

    The network's own initialisation is torchvision's, uniform within 1/sqrt(classes): for a few
    classes the first logits are so large that the loss begins at several times that of guessing.
    Source: Kolesnikov et al. (arXiv 1912.11370), https://github.com/google-research/big_transfer.
    """
    for parameter in network.get_classifier().parameters():
        nn.init.zeros_(parameter)


def _published(
    model: str,
    text: str,
    classes: Sequence[str],
    progress: bool,
    options: dict[str, Any],
) -> tuple[EfficientNet, dict[str, Any], bool]:
    """The network, the preset of its images, and whether its classifier is a new one."""
    entry_point = f"efficientnet_{model}"
    enum = get_model_weights(entry_point)  # raises where there are none for this size
    published = enum.verify(text) if "." not in text else get_weight(text)
    if not isinstance(published, enum):
        raise ValueError(f"weights {text} are of another network than model {model}")
    facts = _facts(published.transforms())
    is_new = list(classes) != list(published.meta["categories"])
    make = getattr(models, entry_point)
    network: EfficientNet = make(weights=published, progress=progress, **options)
    if is_new:
        network.reset_classifier(len(classes))
    return network, facts, is_new


def _facts(preset: images.ImageClassification) -> dict[str, Any]:
    """A preset as fields of `models.Variant`."""
    sides = preset.resize_size
    return {
        "resize": sides[0],
        "crop": preset.crop_size[0],
        "resolution": preset.crop_size[0],
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "interpolation": preset.interpolation,
        "squash": len(sides) == 2,
    }


def _remember(
    network: EfficientNet, facts: dict[str, Any], classes: Sequence[str], resolution: int | None
) -> None:
    """Gives the network the names of the classes and the preset at the run's resolution."""
    if resolution is not None:
        resize = max(resolution, round(facts["resize"] * resolution / facts["crop"]))
        facts = {**facts, "resolution": resolution, "crop": resolution, "resize": resize}
    variant = network.variant = replace(network.variant, **facts)
    network._origin = origin.with_images(network._origin, facts)
    if variant.name not in VARIANTS and origin.has_table(variant):
        network._origin = origin.with_table(network._origin, variant)
    network.class_names = classes


def preset_of(network: EfficientNet) -> images.ImageClassification:
    """The preset of the network's evaluation images."""
    return images.preset(network.variant)
