"""Recipes of training: what is done to the weights and the images, read from data files.

The files lie in `recipes/`; each names its sources. Options of the command line replace single
fields.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from effnet_fast import files

if sys.version_info >= (3, 11):
    import tomllib
else:
    try:
        import tomli as tomllib
    except ImportError:  # told when a recipe is read
        tomllib = None

FOLDER = Path(__file__).with_name("recipes")
RECIPES = ("finetune", "paper", "quick")
SUFFIX = ".toml"
OPTIMIZERS = (
    "sgd",
    "rmsprop_tf",
    "adamw",
    "adam",
    "nadam",
    "radam",
    "adamax",
    "adagrad",
    "adadelta",
    "asgd",
    "rmsprop",
)
SCHEDULES = ("cosine", "exponential", "constant")
CLASS_WEIGHTS = ("none", "balanced")
LARGEST_COUNT = 2**31 - 1
ALL_STAGES = -1  # of `freeze`: the whole of the network but its classifier


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Args:
        epochs: passes over the training images.
        batch: images per process in a step forward and back.
        accumulate: batches whose gradients are summed for one step of the optimizer.
        optimizer: one of OPTIMIZERS; "rmsprop_tf" has TensorFlow's epsilon, inside the root.
        rate: learning rate after the warm-up.
        rate_images: the images per step for which `rate` is meant, to which it is scaled
            proportionally; 0: it is taken as it is.
        momentum: of sgd, where it is Nesterov's, and rmsprop; beta1 of the Adam family is
            PyTorch's.
        alpha: decay of rmsprop's mean of squares.
        epsilon: of the optimizer; None means PyTorch's.
        weight_decay: not applied to norms and biases.
        schedule: "cosine" to final_rate * rate; "exponential", times decay_rate in steps of
            decay_epochs; "constant".
        warmup_epochs: epochs in which the rate grows linearly from 0.
        label_smoothing: share of the target that is spread over all classes.
        clip: largest norm of the gradients; 0 for none.
        ema: decay of the moving average of the weights, which is evaluated and saved; 0 for none.
            The first steps have min(ema, (1 + step) / (10 + step)), as TensorFlow's average.
        layer_decay: ratio of a layer's rate to that of the layer after it.
        freeze: stages of blocks that are not trained, with the stem; -1 for all but the classifier.
        freeze_bn: whether the frozen BatchNorms keep their statistics.
        bn_momentum: of all BatchNorms; None means the network's own.
        dropout, drop_path: probabilities; None means the network's own, 0.2 for drop-path.
        class_weights: "balanced" weighs an image's loss by the inverse frequency of its class, the
            mean over the training images being 1.
        progressive: side of the first epoch's images, which grows linearly to the resolution of
            the last; 0: all epochs have the same. Source: Tan & Le (arXiv 2104.00298), section 4.
        sync_bn: whether BatchNorms share statistics between processes.
        flip: probability of a mirrored image.
        scale, ratio: area and aspect ratio of the crop, as in torchvision's RandomResizedCrop.
        randaugment: magnitude of RandAugment's two operations; 0 for none.
        mixup, cutmix: alpha of their beta distributions; 0 for none.
        erasing: probability of an erased rectangle.
    """

    epochs: int = 5
    batch: int = 32
    accumulate: int = 1
    optimizer: str = "adamw"
    rate: float = 1e-3
    rate_images: int = 0
    momentum: float = 0.9
    alpha: float = 0.9
    epsilon: float | None = None
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    final_rate: float = 0.0
    decay_rate: float = 0.97
    decay_epochs: float = 2.4
    label_smoothing: float = 0.0
    clip: float = 0.0
    ema: float = 0.0
    layer_decay: float = 1.0
    freeze: int = 0
    freeze_bn: bool = True
    bn_momentum: float | None = None
    dropout: float | None = None
    drop_path: float | None = None
    class_weights: str = "none"
    progressive: int = 0
    sync_bn: bool = False
    flip: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (1.0, 1.0)
    randaugment: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check, allowed = CHECKS[field.name]
            value = getattr(self, field.name)
            if not check(value):
                raise ValueError(f"{field.name} must be {allowed}, got {value!r}")
        for name in ("scale", "ratio"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def scaled_rate(self, images: int) -> float:
        """The learning rate for steps over so many images, of all processes together."""
        return self.rate * images / self.rate_images if self.rate_images else self.rate


Check = tuple[Callable[[Any], bool], str]  # of a value, and what is allowed in words


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _count(least: int) -> Check:
    return (
        lambda value: type(value) is int and least <= value <= LARGEST_COUNT,
        f"an integer of at least {least}",
    )


def _one_of(names: tuple[str, ...]) -> Check:
    return (lambda value: value in names, f"one of {', '.join(names)}")


def _pair(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(map(_is_number, value))
        and 0 < value[0] <= value[1]
    )


def _or_none(check: Check) -> Check:
    return (lambda value: value is None or check[0](value), check[1])


NOT_NEGATIVE: Check = (lambda v: _is_number(v) and v >= 0, "a number of at least 0")
POSITIVE: Check = (lambda v: _is_number(v) and v > 0, "a number above 0")
SHARE: Check = (lambda v: _is_number(v) and 0 <= v <= 1, "a number between 0 and 1")
BELOW_ONE: Check = (lambda v: _is_number(v) and 0 <= v < 1, "at least 0 and below 1")
RATIO: Check = (lambda v: _is_number(v) and 0 < v <= 1, "above 0 and at most 1")
FLAG: Check = (lambda v: type(v) is bool, "true or false")
CHECKS: dict[str, Check] = {
    "epochs": _count(1),
    "batch": _count(1),
    "accumulate": _count(1),
    "optimizer": _one_of(OPTIMIZERS),
    "rate": POSITIVE,
    "rate_images": _count(0),
    "momentum": BELOW_ONE,
    "alpha": BELOW_ONE,
    "epsilon": _or_none(POSITIVE),
    "weight_decay": NOT_NEGATIVE,
    "schedule": _one_of(SCHEDULES),
    "warmup_epochs": NOT_NEGATIVE,
    "final_rate": SHARE,
    "decay_rate": RATIO,
    "decay_epochs": POSITIVE,
    "label_smoothing": BELOW_ONE,
    "clip": NOT_NEGATIVE,
    "ema": BELOW_ONE,
    "layer_decay": RATIO,
    "freeze": _count(ALL_STAGES),
    "freeze_bn": FLAG,
    "bn_momentum": _or_none(SHARE),
    "dropout": _or_none(BELOW_ONE),
    "drop_path": _or_none(BELOW_ONE),
    "class_weights": _one_of(CLASS_WEIGHTS),
    "progressive": _count(0),
    "sync_bn": FLAG,
    "flip": SHARE,
    "scale": (lambda v: _pair(v) and v[1] <= 1, "two rising numbers above 0 and at most 1"),
    "ratio": (_pair, "two rising numbers above 0"),
    "randaugment": (lambda v: type(v) is int and 0 <= v < 30, "an integer of at least 0 below 30"),
    "mixup": NOT_NEGATIVE,
    "cutmix": NOT_NEGATIVE,
    "erasing": SHARE,
}


def read_recipe(name: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by its name, or from a TOML file with the same fields.

    Args:
        name: one of RECIPES, or the path of a file that ends in .toml.
        changes: fields that replace the file's; None as a value leaves the file's.

    Raises:
        OSError: the file cannot be read.
        ValueError: no recipe of this name, a field that no recipe has, or a value outside what is
            allowed.
        ImportError: Python 3.10 without tomli.
    """
    text = os.fspath(name)
    if text not in RECIPES and not text.endswith(SUFFIX):
        raise ValueError(
            f"recipe must be one of {', '.join(RECIPES)}, or a file that ends in {SUFFIX}, "
            f"got {text!r}"
        )
    path = FOLDER / f"{text}{SUFFIX}" if text in RECIPES else Path(text)
    if tomllib is None:
        raise ImportError("recipes need tomli on Python 3.10: pip install 'effnet-fast[train]'")
    with files.naming_file(path):
        content = tomllib.loads(files.read_text(path))
        known = {field.name for field in fields(Recipe)}
        if unknown := [entry for entry in content if entry not in known]:
            raise ValueError(f"a recipe has no {unknown[0]!r}; it has {', '.join(sorted(known))}")
        recipe = Recipe(**content)
    given = {key: value for key, value in (changes or {}).items() if value is not None}
    if unknown := sorted(given.keys() - known):
        raise TypeError(f"a recipe has no {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return replace(recipe, **given)
