"""`effnet-fast plot RUN...`: the curves of runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from effnet_fast.cli import common


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "plot",
        help="draw the curves of training runs",
        description="Draws loss, accuracy, learning rate and images/s over the epochs of runs.",
        epilog="example: effnet-fast plot runs/digits --out curves.svg",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the figure, .png or .svg (default: curves.png in the first RUN)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Draws the figure and prints its name."""
    from effnet_fast.training.runs import report

    path = arguments.out or arguments.runs[0] / report.CURVES
    with common.bad_input(OSError, ValueError, ImportError):
        for folder in arguments.runs:
            report.read_history(folder)
    common.check_writable("--out", path)
    with common.bad_input(OSError, ValueError, ImportError):
        report.draw_curves(arguments.runs, path)
    print(path)
