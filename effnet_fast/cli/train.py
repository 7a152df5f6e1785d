"""`effnet-fast train DATA --out RUN`: trains or fine-tunes a network."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from effnet_fast.cli import common, process
from effnet_fast.models.backbone import MEMORY_MODES
from effnet_fast.training.runs.recipe import (
    ALL_STAGES,
    CLASS_WEIGHTS,
    OPTIMIZERS,
    RECIPES,
    SCHEDULES,
)
from effnet_fast.training.runs.settings import DEVICES, PRECISIONS, STRATEGIES

BAD_INPUT = (OSError, ValueError, ImportError, NotImplementedError)
SIGNALLED = 128  # a shell's status of a signal, less its number: 143 for SIGTERM
EXAMPLE = """example, DATA holding train/ and val/ with a folder per class each:
  effnet-fast train DATA --model lite0 --weights DEFAULT --resolution 64 --batch 32 --epochs 3 \\
      --seed 5 --out RUN
  effnet-fast train DATA ... --out RUN --resume     # continues a run that was interrupted
  torchrun --nproc-per-node 4 -m effnet_fast.cli train DATA ... --out RUN
"""


def _stages(text: str) -> int:
    """An argparse type: a number of stages, or "all"."""
    return ALL_STAGES if text == "all" else int(text)


_stages.__name__ = "number of stages"  # in argparse's error
# Options that replace a field of the recipe: what reads the text, and the help.
Row = tuple[Callable[[str], Any], str]
RECIPE_OPTIONS: dict[str, Row] = {
    "epochs": (int, "passes over the training images"),
    "batch": (int, "images per step and process"),
    "accumulate": (int, "batches whose gradients make one step of the optimizer"),
    "rate": (float, "learning rate after the warm-up"),
    "rate_images": (int, "images per step for which the rate is meant; 0: as given"),
    "momentum": (float, "of sgd (Nesterov's) and rmsprop"),
    "alpha": (float, "decay of rmsprop's mean of squares"),
    "epsilon": (float, "of the optimizer"),
    "weight_decay": (float, "not applied to norms and biases"),
    "warmup_epochs": (float, "epochs in which the rate grows from 0"),
    "final_rate": (float, "where the cosine ends, as a share of the rate"),
    "decay_rate": (float, "of the exponential schedule"),
    "decay_epochs": (float, "epochs between two of its steps"),
    "label_smoothing": (float, "share of the target spread over all classes"),
    "clip": (float, "largest norm of the gradients; 0: none"),
    "ema": (float, "decay of the weights' moving average, which is saved; 0: none"),
    "layer_decay": (float, "ratio of a layer's rate to the next layer's"),
    "freeze": (_stages, "stages of blocks that are not trained; all: all but the classifier"),
    "bn_momentum": (float, "of all BatchNorms"),
    "dropout": (float, "before the classifier"),
    "drop_path": (float, "stochastic depth of the last block"),
    "progressive": (int, "side of the first epoch's images, growing to --resolution; 0: constant"),
    "flip": (float, "probability of a mirrored image"),
    "randaugment": (int, "magnitude of RandAugment; 0: none"),
    "mixup": (float, "alpha; 0: none"),
    "cutmix": (float, "alpha; 0: none"),
    "erasing": (float, "probability of an erased rectangle"),
}
CHOICES = {
    "optimizer": (OPTIMIZERS, "rmsprop_tf has TensorFlow's epsilon"),
    "schedule": (SCHEDULES, "of the learning rate"),
    "class_weights": (CLASS_WEIGHTS, "weights of the loss by class"),
}
PAIRS = {"scale": "of the crop's area", "ratio": "of the crop's width by its height"}
FLAGS = {
    "freeze_bn": "frozen BatchNorms keep their statistics",
    "sync_bn": "BatchNorms share statistics between processes",
}
FIELDS = (*RECIPE_OPTIONS, *CHOICES, *PAIRS, *FLAGS)
# Arguments of `loop.train` under the same names.
PASSED = (
    "model",
    "weights",
    "recipe",
    "val",
    "resolution",
    "seed",
    "precision",
    "memory",
    "grad_checkpointing",
    "backend",
    "device",
    "strategy",
    "workers",
    "unreadable_limit",
    "save_minutes",
    "resume",
)


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
    add = parser.add_argument
    add("--weights", metavar="NAME|FILE|RUN", help="where training begins (default: random)")
    add("--val", metavar="DATA", help="validation images (default: val/ or test/ in DATA)")
    add("--resolution", type=common.positive_int, help="pixels (default: the weights' own)")
    add("--seed", type=int, default=0, help="of weights, order, crops and augmentation")
    add("--precision", choices=tuple(PRECISIONS), default="fp32")
    add("--memory", choices=MEMORY_MODES, default="fast", help="lean saves activations")
    add("--grad-checkpointing", action="store_true", help="less memory, one more forward pass")
    add("--backend", default="auto", help="auto, reference, cpu, cpu:avx2, ...")
    add("--device", choices=DEVICES, default="auto")
    add("--strategy", choices=STRATEGIES, default="ddp", help="of several processes")
    add("--workers", type=int, help="processes that read images (default: one per core)")
    add("--unreadable-limit", type=int, metavar="N", help="more unreadable images end the run")
    add("--save-minutes", type=float, default=10.0, help="time between states within an epoch")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", default="finetune", metavar="NAME|FILE", help=f"{', '.join(RECIPES)}, or .toml"
    )
    group = parser.add_argument_group("recipe", "Each replaces a field of the recipe.")
    for name, (kind, text) in RECIPE_OPTIONS.items():
        group.add_argument(_option(name), type=kind, metavar="X", help=text)
    for name, (choices, text) in CHOICES.items():
        group.add_argument(_option(name), choices=choices, help=text)
    for name, text in PAIRS.items():
        group.add_argument(
            _option(name), type=float, nargs=2, metavar=("LOW", "HIGH"), help=f"range {text}"
        )
    for name, text in FLAGS.items():
        group.add_argument(
            _option(name), action=argparse.BooleanOptionalAction, default=None, help=text
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
    given = {name: getattr(arguments, name) for name in (*PASSED, *FIELDS)}
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
