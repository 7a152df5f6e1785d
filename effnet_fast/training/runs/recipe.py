"""Recipes of training: what is done to the weights and the images, read from data files.

The files lie in `recipes/`; each names its sources. Options of the command line replace single
fields.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from effnet_fast import files
from effnet_fast.training.runs.options import (
    BELOW_ONE,
    FLAG,
    NOT_NEGATIVE,
    POSITIVE,
    RATIO,
    SHARE,
    check,
    documented,
    one_of,
    option,
    pair,
    whole,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    try:
        import tomli as tomllib
    except ImportError:  # told when a recipe is read
        tomllib = None

FOLDER = Path(__file__).with_name("recipes")
RECIPES = ("finetune", "paper", "quick")
DEFAULT_RECIPE = RECIPES[0]
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
ALL_STAGES = -1  # of `freeze`: the whole of the network but its classifier


def read_stages(text: str) -> int:
    """A number of stages from the command line's text, where "all" is ALL_STAGES."""
    return ALL_STAGES if text == "all" else int(text)


read_stages.__name__ = "number of stages"  # in argparse's error
STAGES = replace(whole(ALL_STAGES), read=read_stages)


@documented
@dataclass(frozen=True)
class Recipe:
    """How a network is trained."""

    epochs: int = option(5, "passes over the training images", whole(1))
    batch: int = option(32, "images per process in a step forward and back", whole(1))
    accumulate: int = option(
        1, "batches whose gradients are summed for one step of the optimizer", whole(1)
    )
    optimizer: str = option(
        "adamw", "rmsprop_tf has TensorFlow's epsilon, inside the root", one_of(OPTIMIZERS)
    )
    rate: float = option(1e-3, "learning rate after the warm-up", POSITIVE)
    rate_images: int = option(
        0,
        "images per step for which the rate is meant, to which it is scaled proportionally; 0: it "
        "is taken as it is",
        whole(0),
    )
    momentum: float = option(
        0.9,
        "of sgd, where it is Nesterov's, and rmsprop; beta1 of the Adam family is PyTorch's",
        BELOW_ONE,
    )
    alpha: float = option(0.9, "decay of rmsprop's mean of squares", BELOW_ONE)
    epsilon: float | None = option(
        None, "of the optimizer (default: PyTorch's)", POSITIVE.or_none()
    )
    weight_decay: float = option(0.0, "not applied to norms and biases", NOT_NEGATIVE)
    schedule: str = option(
        "cosine",
        "of the rate: cosine to final_rate times the rate; exponential, times decay_rate in steps "
        "of decay_epochs; constant",
        one_of(SCHEDULES),
    )
    warmup_epochs: float = option(
        0.0, "epochs in which the rate grows linearly from 0", NOT_NEGATIVE
    )
    final_rate: float = option(0.0, "where the cosine ends, as a share of the rate", SHARE)
    decay_rate: float = option(0.97, "factor of the exponential schedule", RATIO)
    decay_epochs: float = option(2.4, "epochs between two of its steps", POSITIVE)
    label_smoothing: float = option(
        0.0, "share of the target that is spread over all classes", BELOW_ONE
    )
    clip: float = option(0.0, "largest norm of the gradients; 0: none", NOT_NEGATIVE)
    ema: float = option(
        0.0,
        "decay of the moving average of the weights, which is evaluated and saved; 0: none. The "
        "first steps have min(ema, (1 + step) / (10 + step)), as TensorFlow's average",
        BELOW_ONE,
    )
    layer_decay: float = option(1.0, "ratio of a layer's rate to that of the layer after it", RATIO)
    freeze: int = option(
        0,
        "stages of blocks that are not trained, with the stem; -1 (all on the command line): all "
        "but the classifier",
        STAGES,
    )
    freeze_bn: bool = option(True, "whether frozen BatchNorms keep their statistics", FLAG)
    bn_momentum: float | None = option(
        None, "of all BatchNorms (default: the network's own)", SHARE.or_none()
    )
    dropout: float | None = option(
        None,
        "probability, before the classifier (default: the network's own)",
        BELOW_ONE.or_none(),
    )
    drop_path: float | None = option(
        None,
        "probability, stochastic depth of the last block (default: the network's own, 0.2)",
        BELOW_ONE.or_none(),
    )
    class_weights: str = option(
        "none",
        "balanced weighs an image's loss by the inverse frequency of its class, the mean over the "
        "training images being 1",
        one_of(CLASS_WEIGHTS),
    )
    progressive: int = option(
        0,
        "side of the first epoch's images, which grows linearly to the resolution of the last; 0: "
        "all epochs have the same (arXiv 2104.00298, section 4)",
        whole(0),
    )
    sync_bn: bool = option(False, "whether BatchNorms share statistics between processes", FLAG)
    flip: float = option(0.0, "probability of a mirrored image", SHARE)
    scale: tuple[float, float] = option(
        (1.0, 1.0),
        "range of the crop's share of the image's area, as in torchvision's RandomResizedCrop",
        pair(1.0, "two rising numbers above 0 and at most 1"),
    )
    ratio: tuple[float, float] = option(
        (1.0, 1.0), "range of the crop's width by its height", pair()
    )
    randaugment: int = option(
        0,
        "magnitude of RandAugment's two operations; 0: none",
        whole(0, 29, "an int of at least 0 below 30"),
    )
    mixup: float = option(0.0, "alpha of mixup's beta distribution; 0: none", NOT_NEGATIVE)
    cutmix: float = option(0.0, "alpha of cutmix's beta distribution; 0: none", NOT_NEGATIVE)
    erasing: float = option(0.0, "probability of an erased rectangle", SHARE)

    def __post_init__(self) -> None:
        check(self)
        for name in ("scale", "ratio"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def scaled_rate(self, images: int) -> float:
        """The learning rate for steps over so many images, of all processes together."""
        return self.rate * images / self.rate_images if self.rate_images else self.rate


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
