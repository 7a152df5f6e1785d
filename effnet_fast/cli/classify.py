"""`effnet-fast classify IMAGE...`: the likeliest classes of each image."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effnet_fast import checkpoints, files, models
from effnet_fast.cli import common, process
from effnet_fast.models.efficientnet import EfficientNet
from effnet_fast.models.variants import VARIANTS
from effnet_fast.pretrained import images
from effnet_fast.pretrained.weights import CATEGORIES, ENUMS, get_model_weights, get_weight

DEFAULT_MODEL = "b0"
PUBLISHED_FAMILIES = ("auto", "torchvision")
NAME = r"[A-Z][A-Z0-9_]*|EfficientNet_\w+_Weights\.\w+"  # DEFAULT, EfficientNet_B0_Weights.DEFAULT
CLASSES = 1000  # ImageNet's, where no weights say otherwise
CHANNELS = 3  # red, green, blue
CLASSIFIER = "classifier.1.weight"  # [classes, channels]


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "classify", help="classify images", description="Prints the likeliest classes of images."
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG, PNG or WebP file")
    common.add_common(parser, default_model=None)
    parser.add_argument(
        "--weights",
        metavar="NAME|FILE",
        help="published weights by name (DEFAULT, IMAGENET1K_V1, EfficientNet_B3_Weights.DEFAULT), "
        "or a file, .safetensors or .pth",
    )
    parser.add_argument(
        "--family",
        choices=checkpoints.FORMATS,
        default="auto",
        help="the family of the file's network (default: found from its metadata and names)",
    )
    parser.add_argument(
        "--labels",
        type=Path,
        help="text file with a class name per line (default: ImageNet's names, if the weights are "
        "for 1000 classes)",
    )
    parser.add_argument("--top", type=common.positive_int, default=5, help="how many classes")
    parser.add_argument("--backend", default="auto", help="auto, reference, cpu, cpu:avx2, ...")
    common.add_progress(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Classifies the images one by one and prints all results at the end."""
    common.check_backend(arguments.backend)
    common.set_threads(arguments)
    if arguments.weights is None:
        process.note("no --weights: the weights are random, and the classes mean nothing")
    with common.bad_input(OSError, ValueError, NotImplementedError):
        network = _find_network(arguments)
        labels = _find_labels(network, arguments.labels)
    results = []
    with common.progress(arguments, len(arguments.images), "images") as bar:
        for path in arguments.images:
            with common.bad_input(OSError, ValueError):
                x = network.preset(images.load(path))[None]
            top = classify(network.model, x, arguments.top, labels)
            results.append({"path": path, "top": top})
            bar.update()
    if arguments.json:
        report = {"model": network.size, "backend": arguments.backend, "weights": network.weights}
        common.print_json({**report, "images": results})
    else:
        for result in results:
            print(result["path"])
            for entry in result["top"]:
                name = entry["label"] or f"class {entry['class']}"
                print(f"  {entry['probability']:8.3%}  {name}")


@dataclass(frozen=True)
class Classifier:
    """The model in evaluation mode, its size, and the preset of its weights."""

    model: EfficientNet
    size: str
    preset: images.ImageClassification  # how images are prepared
    weights: str | None  # a file or the full name of published ones; None for random ones

    @property
    def classes(self) -> int:
        """Number of logits."""
        return len(self.model.get_parameter(CLASSIFIER))


def classify(
    model: EfficientNet, x: Tensor, top: int, labels: list[str] | None
) -> list[dict[str, Any]]:
    """The `top` likeliest classes of the one image in x [1,3,H,W], the likeliest first.

    Returns:
        per class its index ("class"), its name or None ("label") and its "probability".
    """
    with torch.inference_mode():
        probabilities = model(x)[0].softmax(dim=0)
    values, classes = probabilities.topk(min(top, len(probabilities)))
    return [
        {"class": index, "label": labels[index] if labels else None, "probability": value}
        for index, value in zip(classes.tolist(), values.tolist(), strict=True)
    ]


def _find_network(arguments: argparse.Namespace) -> Classifier:
    """Takes --weights for a name where it is one, and for a file otherwise."""
    text, backend = arguments.weights, arguments.backend
    if text is not None:
        is_name = re.fullmatch(NAME, text) and not Path(text).is_file()
        return (_published_network if is_name else _network_of_file)(arguments)
    variant = VARIANTS[arguments.model or DEFAULT_MODEL]
    model = common.build_model(variant, backend, CLASSES)
    return Classifier(model, variant.name, images.preset(variant), None)


def _published_network(arguments: argparse.Namespace) -> Classifier:
    text, size = arguments.weights, arguments.model
    if arguments.family not in PUBLISHED_FAMILIES:
        raise ValueError(f"--weights {text} names torchvision's, not {arguments.family}'s")
    if "." not in text:
        text = f"{get_model_weights(f'efficientnet_{size or DEFAULT_MODEL}').__name__}.{text}"
    published = get_weight(text)
    owner = next(name for name, enum in ENUMS.items() if isinstance(published, enum))
    owner = owner.removeprefix("efficientnet_")
    if size not in (None, owner):
        raise ValueError(f"--weights {text} are of {owner}, but --model is {size}")
    silent = arguments.no_progress or not sys.stderr.isatty()
    build = getattr(models, f"efficientnet_{owner}")
    model = build(weights=published, progress=not silent, backend=arguments.backend).eval()
    return Classifier(model, owner, published.transforms(), str(published))


def _network_of_file(arguments: argparse.Namespace) -> Classifier:
    silent = arguments.no_progress or not sys.stderr.isatty()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = EfficientNet.from_checkpoint(
            arguments.weights,
            family=arguments.family,
            variant=arguments.model,
            backend=arguments.backend,
            progress=not silent,
        ).eval()
    for warning in caught:
        process.note(warning.message)
    if model.in_chans != CHANNELS:
        raise ValueError(
            f"{arguments.weights}: the network takes {model.in_chans}-channel images; those that "
            f"are read here have {CHANNELS} channels"
        )
    variant = model.variant
    return Classifier(model, variant.name, images.preset(variant), arguments.weights)


def _find_labels(network: Classifier, path: Path | None) -> list[str] | None:
    if path is None:
        known = network.weights is not None and network.classes == CLASSES
        return CATEGORIES if known else None
    labels = files.read_text(path).splitlines()
    if len(labels) != network.classes:
        raise ValueError(
            f"{path}: {len(labels)} lines, but the network has {network.classes} classes"
        )
    return labels
