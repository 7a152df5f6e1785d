"""`scale grid --train DATA`: a short training of every network."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from effnet_fast.cli import common
from effnet_fast.models.efficientnet import EfficientNet
from effnet_fast.scaling import ShortTraining

RECIPE = "quick"
# Of the schedule, their defaults and help; they belong to --train.
SCHEDULE: tuple[tuple[str, int, str], ...] = (
    ("epochs", 1, "passes over the training images"),
    ("batch", 32, "images per step"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what --train takes."""
    for name, default, text in SCHEDULE:
        parser.add_argument(
            f"--{name}",
            type=common.positive_int,
            metavar="N",
            help=f"with --train: {text} (default: {default})",
        )
    parser.add_argument(
        "--runs",
        type=Path,
        metavar="FOLDER",
        help="with --train: keep the folder of every run in this one (default: beside --csv while "
        "the search lasts, so that an interrupted trial continues, else in a temporary folder)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=common.SEED,
        help="of random weights and of --train (default: 0)",
    )


def scorer_of(arguments: argparse.Namespace) -> ShortTraining | None:
    """The scorer of --train; None without it.

    Raises:
        CommandError: options that belong to --train without it, or a folder that cannot be made.
    """
    given = {name: getattr(arguments, name) for name, *_ in SCHEDULE}
    if arguments.train is None:
        named = [name for name, value in (*given.items(), ("runs", arguments.runs)) if value]
        if named:
            raise common.CommandError(f"--{named[0]} belongs to --train")
        return None
    options = {name: given[name] or default for name, default, _ in SCHEDULE}
    with common.bad_input(OSError):
        os.stat(arguments.train)
        runs = _folder_of(arguments)
    return ShortTraining(
        train,
        arguments.train,
        runs,
        {**options, "seed": arguments.seed},
        keep=arguments.runs is not None,
    )


def _folder_of(arguments: argparse.Namespace) -> str:
    if arguments.runs is not None:
        return str(arguments.runs)
    if arguments.csv is not None:
        return str(arguments.csv.with_name(f"{arguments.csv.stem}-runs"))
    return tempfile.mkdtemp(prefix="effnet-fast-")


@contextlib.contextmanager
def tidied(arguments: argparse.Namespace, scorer: object) -> Iterator[None]:
    """Removes the folder of the runs at the end of a search, unless something is to stay in it."""
    try:
        yield
    finally:
        if isinstance(scorer, ShortTraining) and not scorer.keep:
            if arguments.csv is None:
                shutil.rmtree(scorer.runs, ignore_errors=True)
            with contextlib.suppress(OSError):  # of interrupted trials, or there is none
                os.rmdir(scorer.runs)


def train(
    network: EfficientNet, data: str, out: Path, *, resume: bool, **options: Any
) -> Mapping[str, float]:
    """Trains a network of the same layers, whose random weights are those of the run's seed.

    Runs in whichever process the trial is given to. After a signal the run's state is saved, and
    the same search continues it.

    Raises:
        SystemExit: 128 and the signal's number, as of `effnet-fast train`.
    """
    from effnet_fast.cli.train import SIGNALLED
    from effnet_fast.training.runs import loop
    from effnet_fast.training.runs.processes import StoppedError

    try:
        return loop.train(data, out, model=network.variant, recipe=RECIPE, resume=resume, **options)
    except StoppedError as stopped:
        sys.exit(SIGNALLED + stopped.number)
