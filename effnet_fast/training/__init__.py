"""Training, evaluation and prediction: from a folder of images to answers.

Everything is imported on first use. The core's packages suffice for reading data, evaluating and
predicting; what needs more says which extra brings it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "Augmentation": "data.augmentation",
    "Batch": "data.loading",
    "EpochSampler": "data.sampling",
    "Evaluation": "answers.evaluation",
    "EvaluationCrop": "data.decoding",
    "ImageList": "data.sources",
    "Loader": "data.loading",
    "LossError": "runs.trainer",
    "PredictionOptions": "answers.prediction",
    "RMSpropTF": "runs.optimization",
    "Recipe": "runs.recipe",
    "Resources": "answers.prediction",
    "Settings": "runs.settings",
    "StoppedError": "runs.processes",
    "TrainingCrop": "data.decoding",
    "UnreadableLimitError": "data.loading",
    "WorkerError": "data.workers",
    "evaluate": "answers.evaluation",
    "load_run": "runs.run_folder",
    "open_images": "data.sources",
    "predict": "answers.prediction",
    "read_recipe": "runs.recipe",
    "train": "runs.loop",
    "write_tables": "answers.evaluation",
}

__all__ = [*_EXPORTS]

if TYPE_CHECKING:
    from .answers.evaluation import Evaluation as Evaluation
    from .answers.evaluation import evaluate as evaluate
    from .answers.evaluation import write_tables as write_tables
    from .answers.prediction import PredictionOptions as PredictionOptions
    from .answers.prediction import Resources as Resources
    from .answers.prediction import predict as predict
    from .data.augmentation import Augmentation as Augmentation
    from .data.decoding import EvaluationCrop as EvaluationCrop
    from .data.decoding import TrainingCrop as TrainingCrop
    from .data.loading import Batch as Batch
    from .data.loading import Loader as Loader
    from .data.loading import UnreadableLimitError as UnreadableLimitError
    from .data.sampling import EpochSampler as EpochSampler
    from .data.sources import ImageList as ImageList
    from .data.sources import open_images as open_images
    from .data.workers import WorkerError as WorkerError
    from .runs.loop import train as train
    from .runs.optimization import RMSpropTF as RMSpropTF
    from .runs.processes import StoppedError as StoppedError
    from .runs.recipe import Recipe as Recipe
    from .runs.recipe import read_recipe as read_recipe
    from .runs.run_folder import load_run as load_run
    from .runs.settings import Settings as Settings
    from .runs.trainer import LossError as LossError


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
