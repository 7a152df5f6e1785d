"""`effnet-fast train DATA --out RUN`: trains or fine-tunes a network."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effnet_fast.cli import common, process
from effnet_fast.training.runs.options import Option, options_of
from effnet_fast.training.runs.recipe import DEFAULT_RECIPE, RECIPES, Recipe
from effnet_fast.training.runs.settings import Settings

BAD_INPUT = (OSError, ValueError, ImportError, NotImplementedError)
SIGNALLED = 128  # a shell's status of a signal, less its number: 143 for SIGTERM
EXAMPLE = """example, DATA holding train/ and val/ with a folder per class each:
  effnet-fast train DATA --model lite0 --weights DEFAULT --resolution 64 --batch 32 --epochs 3 \\
      --seed 5 --out RUN
  effnet-fast train DATA ... --out RUN --resume     # continues a run that was interrupted
  torchrun --nproc-per-node 4 -m effnet_fast.cli train DATA ... --out RUN
"""


METAVARS = {"weights": "NAME|FILE|RUN", "unreadable_limit": "N"}
RECIPE = options_of(Recipe)
SETTINGS = options_of(Settings)
PASSED = ("recipe", "val", "resume", *SETTINGS, *RECIPE)  # to `train`, under the same names


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "train",
        help="train or fine-tune a network on a folder of images",
        description="Trains a network on a folder of images. RUN then holds its weights, class "
        "names, metrics and recipe; eval, predict, classify and export take it.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", metavar="DATA", help="folder, .csv, .parquet, or shards")
    parser.add_argument("--out", required=True, type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="continue the run in RUN")
    common.add_common(parser, default_model=None)
    _add_settings(parser)
    _add_recipe(parser)
    common.add_progress(parser)
    parser.set_defaults(run=run)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `Settings` but --model, which `common` adds."""
    parser.add_argument(
        "--val", metavar="DATA", help="validation images (default: val/ or test/ in DATA)"
    )
    for name, option in SETTINGS.items():
        if name != "model":
            _add(parser, name, option, getattr(Settings, name))


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """Adds --recipe and the options of `Recipe`, whose defaults are the recipe's."""
    parser.add_argument(
        "--recipe",
        default=DEFAULT_RECIPE,
        metavar="NAME|FILE",
        help=f"{', '.join(RECIPES)}, or .toml",
    )
    group = parser.add_argument_group("recipe", "Each replaces a field of the recipe.")
    for name, option in RECIPE.items():
        _add(group, name, option, None)


def _add(parser: Any, name: str, option: Option, default: Any) -> None:
    """Adds an option; a flag without a default can be switched off, too."""
    rule, text = option.rule, option.text
    given: dict[str, Any] = {"type": rule.read, "metavar": METAVARS.get(name, "X")}
    if rule.read is bool:
        given = {"action": argparse.BooleanOptionalAction if default is None else "store_true"}
    elif rule.choices:
        given = {"choices": rule.choices}
    elif rule.count == 2:
        given |= {"nargs": 2, "metavar": ("LOW", "HIGH")}
    flag = f"--{name.replace('_', '-')}"
    parser.add_argument(flag, default=default, help=text.replace("%", "%%"), **given)


def run(arguments: argparse.Namespace) -> None:
    """Trains; prints a table of the epochs, or JSON.

    Raises:
        SystemExit: 128 and the signal's number, where one ended the run after a whole step.
    """
    from effnet_fast.training.data.workers import WorkerError
    from effnet_fast.training.runs.loop import train
    from effnet_fast.training.runs.processes import StoppedError

    common.check_backend(arguments.backend)
    common.set_threads(arguments)
    given = {name: getattr(arguments, name) for name in PASSED}
    silent = arguments.no_progress or not sys.stderr.isatty()
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        with _warnings_as_notes(), common.bad_input(*BAD_INPUT, WorkerError):
            metrics = train(arguments.data, arguments.out, progress=not silent, **given)
    except StoppedError as stopped:
        if is_main:
            process.note(stopped)
        sys.exit(SIGNALLED + stopped.number)
    if is_main:
        common.print_report(arguments, metrics, _print)


@contextlib.contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Prints warnings, of a class without images for one, as lines on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_: process.note(message)
        yield


def _print(metrics: dict[str, Any]) -> None:
    from effnet_fast.training.runs import report, run_folder

    run = Path(metrics["out"])
    print(common.format_table(report.table_rows(report.read_history(metrics["out"]))))
    print(f"{run / run_folder.WEIGHTS}: {metrics['model']}, {metrics['classes']} classes")
    if metrics["unreadable"]:
        process.note(
            f"{metrics['unreadable']} images could not be read and were left out: "
            f"{run / run_folder.UNREADABLE} names them"
        )
