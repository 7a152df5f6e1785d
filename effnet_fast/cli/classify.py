"""`effnet-fast classify IMAGE...`: the likeliest classes of each image."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effnet_fast import checkpoints, images
from effnet_fast.cli import common
from effnet_fast.models.efficientnet import EfficientNet
from effnet_fast.models.variants import VARIANTS, Variant

CLASSES = 1000  # ImageNet's, where no weights say otherwise
CLASSIFIER = "classifier.1.weight"  # [classes, channels]


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "classify", help="classify images", description="Prints the likeliest classes of images."
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG, PNG or WebP file")
    common.add_common(parser, default_model="b0")
    parser.add_argument("--weights", type=Path, help="trained weights, .safetensors or .pth")
    parser.add_argument("--labels", type=Path, help="text file with a class name per line")
    parser.add_argument("--top", type=common.positive_int, default=5, help="how many classes")
    parser.add_argument("--backend", default="auto", help="auto, reference, cpu, cpu:avx2, ...")
    common.add_progress(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Classifies the images one by one and prints all results at the end."""
    common.check_backend(arguments.backend)
    common.set_threads(arguments)
    variant = VARIANTS[arguments.model]
    if arguments.weights is None:
        print(
            "effnet-fast: no --weights: random ones are used, labels mean nothing", file=sys.stderr
        )
    with common.bad_input(OSError, ValueError, NotImplementedError):
        model = _load_model(variant, arguments.weights, arguments.backend)
        labels = _load_labels(arguments.labels, len(model.get_parameter(CLASSIFIER)))
    results = []
    with common.progress(arguments, len(arguments.images), "images") as bar:
        for path in arguments.images:
            with common.bad_input(OSError, ValueError):
                x = images.preprocess(images.load(path), variant)
            results.append({"path": path, "top": classify(model, x, arguments.top, labels)})
            bar.update()
    if arguments.json:
        weights = None if arguments.weights is None else str(arguments.weights)
        report = {"model": variant.name, "backend": arguments.backend, "weights": weights}
        common.print_json({**report, "images": results})
    else:
        for result in results:
            _print_result(result)


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


def _load_model(variant: Variant, weights: Path | None, backend: str) -> EfficientNet:
    if weights is None:
        return common.build_model(variant, backend, CLASSES)
    state = checkpoints.load(weights)
    classifier = state.get(CLASSIFIER)
    classes = CLASSES if classifier is None or classifier.ndim != 2 else len(classifier)
    model = common.build_model(variant, backend, classes)
    try:
        checkpoints.check(model, state)
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from error
    model.load_state_dict(state)
    return model


def _load_labels(path: Path | None, classes: int) -> list[str] | None:
    if path is None:
        return None
    labels = path.read_text(encoding="utf-8").splitlines()
    if len(labels) != classes:
        raise ValueError(f"{path}: {len(labels)} lines, but the network has {classes} classes")
    return labels


def _print_result(result: dict[str, Any]) -> None:
    print(result["path"])
    for entry in result["top"]:
        name = entry["label"] or f"class {entry['class']}"
        print(f"  {entry['probability']:8.3%}  {name}")
