"""`effnet-fast predict RUN FOLDER --out FILE`: a row of answers for each of many images."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from effnet_fast.cli import common, networks, process
from effnet_fast.training.answers import inference, outputs, prediction, shares
from effnet_fast.training.answers.prediction import OnRows, PredictionOptions, Resources
from effnet_fast.training.data.workers import WorkerError

BAD_INPUT = (OSError, ValueError, NotImplementedError, ImportError, WorkerError)
EXAMPLES = """examples:
  effnet-fast predict runs/pets photos --out pets.csv
  effnet-fast predict EfficientNet_Lite0_Weights.DEFAULT photos --out features.parquet --embeddings
  torchrun --nproc-per-node 4 -m effnet_fast.cli predict runs/pets photos --out pets.parquet
"""


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "predict",
        help="classify many images into a file",
        description="Writes a row for each image: its likeliest classes, or pooled features, or "
        "the reason why it cannot be read. Called again, it continues where it stopped; each image "
        "has one row.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    networks.add_run(parser)
    parser.add_argument(
        "data",
        metavar="FOLDER",
        help="a folder, whose images and those of its folders are read; a list .txt of a path per "
        'line; a table .csv or .parquet with the column path; shards "x-{000..007}.tar"',
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help=f"the file to write or to continue: {', '.join(outputs.SUFFIXES)}",
    )
    parser.add_argument("--top", type=common.positive_int, default=5, help="classes per image")
    parser.add_argument(
        "--embeddings", action="store_true", help="write pooled features instead of classes"
    )
    add_resources(parser)
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help='run on the machines of a Ray cluster: "auto", ray://HOST:10001, or "local" for one '
        "on this machine",
    )
    parser.set_defaults(run=run)


def add_resources(parser: argparse.ArgumentParser) -> None:
    """Adds the options that eval and predict share: dtype, draft, device, batch, workers, ..."""
    parser.add_argument(
        "--dtype",
        choices=tuple(inference.DTYPES),
        default="float32",
        help="of the activations; bfloat16 is quicker where the processor multiplies it",
    )
    parser.add_argument(
        "--draft",
        action="store_true",
        help="decode large JPEG files at a smaller size: quicker, with slightly other pixels",
    )
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)"
    )
    parser.add_argument(
        "--batch", type=common.positive_int, help="images per call (default: 8, on a GPU 64)"
    )
    parser.add_argument(
        "--workers", type=common.positive_int, help="processes (default: one per core)"
    )
    parser.add_argument("--backend", default="auto", help="auto, reference, cpu, cpu:avx2, ...")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> None:
    """Predicts; prints a summary or JSON, of all processes the first one."""
    common.check_backend(arguments.backend)
    with common.bad_input(ValueError):
        outputs.check_suffix(arguments.out)
    common.check_writable("--out", arguments.out)
    network, options = load(arguments, top=arguments.top, embeddings=arguments.embeddings)
    with common.bad_input(*BAD_INPUT), noted_warnings(), Progress(arguments) as bar:
        report = prediction.predict(
            network.model,
            arguments.data,
            arguments.out,
            preset=network.preset,
            options=options,
            resources=Resources(arguments.batch, arguments.workers, arguments.ray),
            on_rows=bar.begin,
        )
    if shares.is_first():
        common.print_report(arguments, report, _print)


def load(
    arguments: argparse.Namespace, **options: Any
) -> tuple[networks.Network, PredictionOptions]:
    """The network that the arguments name, on its device, and the options.

    Raises:
        CommandError: one of them cannot be had.
    """
    with common.bad_input(OSError, ValueError, NotImplementedError):
        network = networks.find(arguments.network, arguments)
        labels = networks.find_labels(network, arguments.labels)
    network.model.to(_device(arguments.device))
    given = {name: getattr(arguments, name) for name in ("dtype", "backend", "draft")}
    return network, PredictionOptions(labels=labels, **given, **options)


@contextlib.contextmanager
def noted_warnings() -> Iterator[None]:
    """Prints warnings of the data as notes, at the end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        yield
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        process.note(text)


def _device(name: str | None) -> torch.device:
    """The device of this process: of torchrun's processes each has a GPU of its own."""
    if name is None:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise common.CommandError(f"--device must be cpu or cuda, got {name!r}") from None
    if device.type not in inference.BATCH:
        raise common.CommandError(f"--device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise common.CommandError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return device


class Progress:
    """A bar of images with rate and remaining time, on a terminal alone."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._silent = arguments.no_progress or not shares.is_first() or not sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._unreadable = 0

    def begin(self, total: int) -> OnRows:
        """Shows the bar; what it returns moves it."""
        self._bar = tqdm(
            total=total, unit=" images", disable=self._silent, file=sys.stderr, leave=False
        )
        return self._advance

    def _advance(self, images: int, unreadable: int) -> None:
        assert self._bar is not None
        self._unreadable += unreadable
        if self._unreadable:
            self._bar.set_postfix_str(f"{self._unreadable} unreadable", refresh=False)
        self._bar.update(images)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _print(report: dict[str, Any]) -> None:
    rate = report["images_per_second"]
    there = f", {report['present']:,} were there" if report["present"] else ""
    print(
        f"{report['out']}: {report['images']:,} rows added{there}; "
        f"{report['unreadable']:,} unreadable" + (f"; {rate:,.1f} images/s" if rate else "")
    )
