"""Training, evaluation and prediction: from a folder of images to answers.

Everything is imported on first use. The core's packages suffice for reading data, evaluating and
predicting; what needs more says which extra brings it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "Augmentation": "augmentation",
    "Batch": "loading",
    "EpochSampler": "sampling",
    "EvaluationCrop": "decoding",
    "ImageList": "sources",
    "Loader": "loading",
    "LossError": "trainer",
    "RMSpropTF": "optimization",
    "Recipe": "recipe",
    "StoppedError": "processes",
    "TrainingCrop": "decoding",
    "open_images": "sources",
    "read_recipe": "recipe",
    "train": "loop",
}

__all__ = [*_EXPORTS]

if TYPE_CHECKING:
    from .augmentation import Augmentation as Augmentation
    from .decoding import EvaluationCrop as EvaluationCrop
    from .decoding import TrainingCrop as TrainingCrop
    from .loading import Batch as Batch
    from .loading import Loader as Loader
    from .loop import train as train
    from .optimization import RMSpropTF as RMSpropTF
    from .processes import StoppedError as StoppedError
    from .recipe import Recipe as Recipe
    from .recipe import read_recipe as read_recipe
    from .sampling import EpochSampler as EpochSampler
    from .sources import ImageList as ImageList
    from .sources import open_images as open_images
    from .trainer import LossError as LossError


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
