"""`effnet-fast classify IMAGE...`: the likeliest classes of each image."""

from __future__ import annotations

import argparse
import copy
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effnet_fast import checkpoints, files, models
from effnet_fast.cli import common, explain, process
from effnet_fast.models.efficientnet import EfficientNet
from effnet_fast.models.variants import VARIANTS
from effnet_fast.pretrained import images
from effnet_fast.pretrained.weights import CATEGORIES, ENUMS, get_model_weights, get_weight

DEFAULT_MODEL = "b0"  # of published weights that are named without a model
PACKAGED_MODEL = "lite0"  # without --model and --weights: an installed package has its weights
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
        "or a file, .safetensors or .pth (default: Lite0's, and those of --model lite0 to lite2, "
        "from an installed package; random ones of other models)",
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
        help="text file with a class name per line (default: the names that the checkpoint has, or "
        "ImageNet's, if the weights are for 1000 classes)",
    )
    parser.add_argument("--top", type=common.positive_int, default=5, help="how many classes")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="print stock PyTorch's probabilities beside those of the fused kernels",
    )
    explain.add_option(parser)
    parser.add_argument("--backend", default="auto", help="auto, reference, cpu, cpu:avx2, ...")
    common.add_progress(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Classifies the images one by one and prints all results at the end."""
    common.check_backend(arguments.backend)
    common.set_threads(arguments)
    with common.bad_input(OSError, ValueError, NotImplementedError):
        network = _find_network(arguments)
        labels = _find_labels(network, arguments.labels)
    if network.weights is None:
        process.note("no --weights: the weights are random, and the classes mean nothing")
    stock = _stock_of(network.model) if arguments.compare else None
    overlays = arguments.explain and explain.Overlays(arguments.explain, arguments.images)
    results = []
    with common.progress(arguments, len(arguments.images), "images") as bar:
        for path in arguments.images:
            with common.bad_input(OSError, ValueError):
                x = network.preset(images.load(path))[None]
            top = classify(network.model, x, arguments.top, labels, stock)
            results.append({"path": path, "top": top})
            if overlays:
                results[-1]["explanation"] = overlays.write(
                    network.model, network.preset, x, path, top[0]["class"]
                )
            bar.update()
    if arguments.json:
        report = {"model": network.size, "backend": arguments.backend, "weights": network.weights}
        common.print_json({**report, "images": results})
    else:
        (_print_compared if arguments.compare else _print)(results)


def _print(results: list[dict[str, Any]]) -> None:
    for result in results:
        print(result["path"])
        for entry in result["top"]:
            print(f"  {entry['probability']:8.3%}  {_name(entry)}")
        _print_explanation(result)


def _print_compared(results: list[dict[str, Any]]) -> None:
    shown = differ = 0
    print("     fused     stock")
    for result in results:
        print(result["path"])
        for entry in result["top"]:
            fused, stock = (f"{entry[key]:.1%}" for key in ("probability", "stock_probability"))
            print(f"  {fused:>8}  {stock:>8}  {_name(entry)}")
            shown, differ = shown + 1, differ + (fused != stock)
        _print_explanation(result)
    print(
        f"{differ} of {shown} percentages differ between the fused kernels and stock PyTorch"
        if differ
        else f"All {shown} percentages of the fused kernels are stock PyTorch's, to the last digit."
    )


def _print_explanation(result: dict[str, Any]) -> None:
    if "explanation" in result:
        print(f"  what speaks for {_name(result['top'][0])}: {result['explanation']}")


def _name(entry: dict[str, Any]) -> str:
    return entry["label"] or f"class {entry['class']}"


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
    model: EfficientNet,
    x: Tensor,
    top: int,
    labels: list[str] | None,
    stock: EfficientNet | None = None,
) -> list[dict[str, Any]]:
    """The `top` likeliest classes of the one image in x [1,3,H,W], the likeliest first.

    Returns:
        per class its index ("class"), its name or None ("label"), its "probability" and, where
        `stock` is given, that network's ("stock_probability").
    """
    with torch.inference_mode():
        probabilities = model(x)[0].softmax(dim=0)
        beside = None if stock is None else stock(x)[0].softmax(dim=0).tolist()
    values, classes = probabilities.topk(min(top, len(probabilities)))
    return [
        {
            "class": index,
            "label": labels[index] if labels else None,
            "probability": value,
            **({} if beside is None else {"stock_probability": beside[index]}),
        }
        for index, value in zip(classes.tolist(), values.tolist(), strict=True)
    ]


def _stock_of(model: EfficientNet) -> EfficientNet:
    """The same weights, run by PyTorch."""
    stock = copy.deepcopy(model)
    stock.backend = "reference"
    return stock


def _find_network(arguments: argparse.Namespace) -> Classifier:
    """Takes --weights for a name where it is one, and for a file otherwise."""
    text = arguments.weights
    if text is not None:
        is_name = re.fullmatch(NAME, text) and not Path(text).is_file()
        return _published_network(text, arguments) if is_name else _network_of_file(arguments)
    size = arguments.model or PACKAGED_MODEL
    enum = ENUMS.get(f"efficientnet_{size}")
    if enum is not None and enum["DEFAULT"].package is not None:
        return _published_network(f"{enum.__name__}.DEFAULT", arguments)
    variant = VARIANTS[size]
    model = common.build_model(variant, arguments.backend, CLASSES)
    return Classifier(model, variant.name, images.preset(variant), None)


def _published_network(text: str, arguments: argparse.Namespace) -> Classifier:
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
