"""The network that a command is given: published weights by name, a file, or a run's folder."""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effnet_fast import checkpoints, files, models
from effnet_fast.cli import common, process
from effnet_fast.models.efficientnet import EfficientNet
from effnet_fast.models.variants import VARIANTS
from effnet_fast.pretrained import images
from effnet_fast.pretrained.weights import CATEGORIES, ENUMS, get_model_weights, get_weight
from effnet_fast.training.runs import run_folder
from effnet_fast.training.runs.network import DEFAULT_MODEL, NAME

PACKAGED_MODEL = "lite0"  # without --model and weights: an installed package has its weights
PUBLISHED_FAMILIES = ("auto", "torchvision")
CLASSES = 1000  # ImageNet's, where no weights say otherwise
CHANNELS = 3  # red, green, blue
CLASSIFIER = "classifier.1.weight"  # [classes, channels]


@dataclass(frozen=True)
class Network:
    """The model in evaluation mode, its size, and the preset of its weights."""

    model: EfficientNet
    size: str
    preset: images.ImageClassification  # how images are prepared
    weights: str | None  # a file or the full name of published ones; None for random ones

    @property
    def classes(self) -> int:
        """Number of logits."""
        return len(self.model.get_parameter(CLASSIFIER))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds --family and --labels, which `find` and `find_labels` read."""
    parser.add_argument(
        "--family",
        choices=checkpoints.FORMATS,
        default="auto",
        help="the family of the file's network (default: found from its metadata and names)",
    )
    parser.add_argument(
        "--labels",
        type=Path,
        help="text file with a class name per line (default: the names that the checkpoint has, or "
        "ImageNet's, if the weights are for 1000 classes)",
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds RUN and the options that go with it."""
    parser.add_argument(
        "network",
        metavar="RUN",
        help="the network: the folder that `effnet-fast train` left, a checkpoint (.safetensors "
        "or .pth), or the name of published weights (EfficientNet_Lite0_Weights.DEFAULT)",
    )
    parser.add_argument(
        "--model", choices=tuple(VARIANTS), help="which EfficientNet (default: found from RUN)"
    )
    add_options(parser)


def find(text: str | None, arguments: argparse.Namespace) -> Network:
    """The network of a name, a file or a folder; of None the packaged weights, or random ones.

    Args:
        text: what names it.
        arguments: with model, family, backend and no_progress.

    Raises:
        OSError, ValueError, NotImplementedError: it cannot be read, or is none.
    """
    if text is not None:
        is_name = NAME.fullmatch(text) and not _is_checkpoint(Path(text))
        return _published(text, arguments) if is_name else _of_file(text, arguments)
    size = arguments.model or PACKAGED_MODEL
    enum = ENUMS.get(f"efficientnet_{size}")
    if enum is not None and enum["DEFAULT"].package is not None:
        return _published(f"{enum.__name__}.DEFAULT", arguments)
    variant = VARIANTS[size]
    model = common.build_model(variant, arguments.backend, CLASSES)
    return Network(model, variant.name, images.preset(variant), None)


def find_labels(network: Network, path: Path | None) -> list[str] | None:
    """The names of the classes: of the file, else the network's, else ImageNet's, or None.

    Raises:
        OSError, ValueError: the file cannot be read, or has another number of lines.
    """
    if path is None:
        names = network.model.class_names
        if names and len(names) == network.classes:
            return list(names)
        known = network.weights is not None and network.classes == CLASSES
        return CATEGORIES if known else None
    labels = files.read_text(path).splitlines()
    if len(labels) != network.classes:
        raise ValueError(
            f"{path}: {len(labels)} lines, but the network has {network.classes} classes"
        )
    return labels


def _is_checkpoint(path: Path) -> bool:
    """Whether a text that looks like a name is a file, or a folder with weights."""
    return path.is_file() or (path.is_dir() and any(path.glob(f"*{checkpoints.SAFETENSORS}")))


def _published(text: str, arguments: argparse.Namespace) -> Network:
    size = arguments.model
    if arguments.family not in PUBLISHED_FAMILIES:
        raise ValueError(f"--weights {text} names published ones, not {arguments.family}'s")
    if "." not in text:
        text = f"{get_model_weights(f'efficientnet_{size or DEFAULT_MODEL}').__name__}.{text}"
    published = get_weight(text)
    owner = next(name for name, enum in ENUMS.items() if isinstance(published, enum))
    owner = owner.removeprefix("efficientnet_")
    if size not in (None, owner):
        raise ValueError(f"--weights {text} are of {owner}, but --model is {size}")
    build: Any = getattr(models, f"efficientnet_{owner}")
    silent = _is_silent(arguments)
    model = build(weights=published, progress=not silent, backend=arguments.backend).eval()
    return Network(model, owner, published.transforms(), str(published))


def _of_file(text: str, arguments: argparse.Namespace) -> Network:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model, preset, _ = run_folder.load_run(
            text,
            family=arguments.family,
            variant=arguments.model,
            backend=arguments.backend,
            progress=not _is_silent(arguments),
        )
    for warning in caught:
        process.note(warning.message)
    if model.in_chans != CHANNELS:
        raise ValueError(
            f"{text}: the network takes {model.in_chans}-channel images; those that "
            f"are read here have {CHANNELS} channels"
        )
    return Network(model, model.variant.name, preset, text)


def _is_silent(arguments: argparse.Namespace) -> bool:
    return arguments.no_progress or not sys.stderr.isatty()
