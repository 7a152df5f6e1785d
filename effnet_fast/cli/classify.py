"""`effnet-fast classify IMAGE...`: the likeliest classes of each image."""

from __future__ import annotations

import argparse
import glob
import os
from typing import Any

import torch
from torch import Tensor

from effnet_fast.cli import common, explain, networks, process
from effnet_fast.models.efficientnet import EfficientNet
from effnet_fast.pretrained import images
from effnet_fast.training.answers import inference
from effnet_fast.training.data import folders

EXAMPLES = """examples:
  effnet-fast classify photo.jpg
  effnet-fast classify photos --weights RUN --top 3 --explain overlays
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "classify",
        help="classify images",
        description="Prints the likeliest classes of images.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="JPEG, PNG or WebP file; a folder, whose images and those of its folders are taken; "
        'or a pattern in quotes ("photos/**/*.jpg"). `predict` is for many',
    )
    common.add_common(parser, default_model=None)
    parser.add_argument(
        "--weights",
        metavar="NAME|FILE|RUN",
        help="published weights by name (DEFAULT, IMAGENET1K_V1, EfficientNet_B3_Weights.DEFAULT), "
        "the folder of a run, or a file, .safetensors or .pth (default: Lite0's, and those of "
        "--model lite0 to lite2, from an installed package; random ones of other models)",
    )
    networks.add_options(parser)
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
        paths = find_images(arguments.images)
        network = networks.find(arguments.weights, arguments)
        labels = networks.find_labels(network, arguments.labels)
    if network.weights is None:
        process.note("no --weights: the weights are random, and the classes mean nothing")
    stock = inference.stock_of(network.model) if arguments.compare else None
    overlays = arguments.explain and explain.Overlays(arguments.explain, paths)
    results = []
    with common.progress(arguments, len(paths), "images") as bar:
        for path in paths:
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


def find_images(words: list[str]) -> list[str]:
    """The images that words name: themselves, a folder's, or those that fit a pattern, sorted.

    Raises:
        ValueError: a folder without images, or a pattern that nothing fits.
        OSError: a folder cannot be read.
    """
    paths = []
    for word in words:
        found = [word]
        if os.path.isdir(word):
            found = list(folders.walk(word))
        elif glob.has_magic(word) and not os.path.lexists(word):
            found = sorted(filter(os.path.isfile, glob.glob(word, recursive=True)))
        if not found:
            raise ValueError(f"{word}: no images there")
        paths += found
    return paths


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
