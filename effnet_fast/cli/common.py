"""What the subcommands share: options, errors and progress bars."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from effnet_fast import files, models
from effnet_fast.backends import OPS, can_run
from effnet_fast.models.efficientnet import EfficientNet
from effnet_fast.models.variants import VARIANTS, Variant

SEED = 0  # of random weights and inputs, so that two runs compute the same
LARGEST = 2**31 - 1  # of an integer option: what PyTorch's and the kernels' counters hold
THREADS_PER_CORE = 8  # that --threads takes; thousands end the process when they start
LEAST_THREADS = 64  # which it takes on any machine


class CommandError(Exception):
    """Bad input: `main` prints the message on one line and exits with status 2."""


class Parser(argparse.ArgumentParser):
    """A parser whose help tells when it cannot be written; argparse's own keeps that to itself."""

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    return _integer(text, LARGEST)


def thread_count(text: str) -> int:
    """An argparse type: a number of threads that this machine can start."""
    return _integer(text, max(LEAST_THREADS, THREADS_PER_CORE * (os.cpu_count() or 1)))


def _integer(text: str, largest: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:50]!r} is not an integer") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    if value > largest:
        raise argparse.ArgumentTypeError(f"{text[:50]} is above {largest}")
    return value


def add_common(parser: argparse.ArgumentParser, default_model: str | None) -> None:
    """Adds --model, --threads and --json."""
    parser.add_argument(
        "--model", choices=tuple(VARIANTS), default=default_model, help="which EfficientNet"
    )
    parser.add_argument("--threads", type=thread_count, help="CPU threads (default: torch's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_progress(parser: argparse.ArgumentParser) -> None:
    """Adds --no-progress."""
    parser.add_argument("--no-progress", action="store_true", help="no progress bar on a terminal")


def progress(arguments: argparse.Namespace, total: int, label: str) -> tqdm[Any]:
    """A progress bar on stderr, silent when that is no terminal or --no-progress is given."""
    silent = arguments.no_progress or not sys.stderr.isatty()
    return tqdm(total=total, desc=label, disable=silent, file=sys.stderr, leave=False)


def set_threads(arguments: argparse.Namespace) -> None:
    """Applies --threads to torch, and so to the kernels, which ask torch."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)


def build_model(variant: Variant, backend: str, num_classes: int = 1000) -> EfficientNet:
    """A randomly initialised network in evaluation mode, the same one at every call."""
    entry_point = getattr(models, f"efficientnet_{variant.name}")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        model: EfficientNet = entry_point(weights=None, num_classes=num_classes, backend=backend)
    return model.eval()


def check_backend(name: str) -> None:
    """Refuses a backend that is unknown or can run none of a network's ops here."""
    with bad_input(ValueError):
        reasons = [can_run(name, op) for op in OPS]
    if all(reasons):
        raise CommandError(f"backend {name} cannot run here: {reasons[0]}")


def check_writable(option: str, path: Path) -> None:
    """Refuses a file that could not be written, before anything has been computed for it."""
    problem = None
    if path.exists() and not path.is_dir():
        with bad_input(ValueError):
            files.check_regular(path)
    if not path.parent.is_dir():
        problem = f"there is no folder {path.parent}"
    elif path.is_dir():
        problem = "it is a folder"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        problem = "there is no permission to write it"
    if problem is not None:
        raise CommandError(f"{option} {path}: {problem}")


@contextlib.contextmanager
def bad_input(*errors: type[Exception]) -> Iterator[None]:
    """Turns the errors that a user's input causes into `CommandError`s."""
    try:
        yield
    except errors as error:
        message = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            message = f"{os.fsdecode(error.filename)}: {error.strerror}"
        raise CommandError(" ".join(message.split())) from error


def print_json(content: dict[str, Any]) -> None:
    """One JSON object on standard output, indented; what is no finite number becomes null."""
    print(json.dumps(_finite(content), indent=2, allow_nan=False))


def _finite(content: Any) -> Any:
    """The same with None for NaN and Infinity, which JSON does not have."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def print_report(
    arguments: argparse.Namespace, report: dict[str, Any], show: Callable[[dict[str, Any]], None]
) -> None:
    """The report as JSON where --json is given, else as `show` prints it."""
    (print_json if arguments.json else show)(report)


def format_table(rows: list[list[str]]) -> str:
    """Rows under one another, the first column flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
