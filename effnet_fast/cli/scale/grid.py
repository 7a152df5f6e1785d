"""`effnet-fast scale grid`: search alpha, beta and gamma at equal work."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from effnet_fast.cli import common
from effnet_fast.cli.scale import grid_training, plot, units
from effnet_fast.cli.scale.options import WORDS
from effnet_fast.scaling import Trial, candidates, grid_search
from effnet_fast.scaling.accuracy import LABEL, NOTE
from effnet_fast.scaling.grid import ENGINES, STEP, TOLERANCE, Scorer


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "grid",
        help="search the rule's constants at equal work",
        description="Scores the networks at phi for every alpha, beta and gamma on a grid with "
        "alpha * beta^2 * gamma^2 near 2.",
    )
    scored = parser.add_mutually_exclusive_group()
    scored.add_argument(
        "--scorer",
        metavar="MODULE:FUNCTION",
        help="takes a network, returns its score, larger is better (default: an estimate of "
        "ImageNet top-1 from published accuracies)",
    )
    scored.add_argument(
        "--train",
        metavar="DATA",
        help="score a network by its top-1 after a short training from random weights on DATA, "
        "which `effnet-fast train` takes: a folder with train/ and val/, ...",
    )
    grid_training.add_options(parser)
    parser.add_argument("--phi", type=float, default=1.0)
    parser.add_argument("--step", type=float, default=STEP, help=f"of the grid (default: {STEP})")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help=f"how far the product may lie from 2 (default: {TOLERANCE})",
    )
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="keep trials in this file, and do not repeat the ones in it",
    )
    parser.add_argument(
        "--workers",
        type=common.positive_int,
        help="trials that run at the same time (default: 1; over Ray: as many as Ray runs)",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="process",
        help="process, or ray to run trials over Ray",
    )
    parser.add_argument("--top", type=common.positive_int, default=10, help="rows of the table")
    plot.add_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_progress(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Prints the best trials, or all as JSON."""
    plot.check(arguments)
    scorer, name = _scorer_of(arguments)
    with (
        grid_training.tidied(arguments, scorer),
        common.bad_input(OSError, ValueError, RuntimeError, ImportError, OverflowError),
    ):
        scalings = candidates(arguments.step, arguments.tolerance)
        with common.progress(arguments, len(scalings), "trials") as bar:
            trials = grid_search(
                scorer,
                scorer_name=name,
                scalings=scalings,
                phi=arguments.phi,
                csv=arguments.csv,
                workers=arguments.workers,
                engine=arguments.engine,
                seed=arguments.seed,
                on_trial=lambda trial: bar.update(),
            )
    report = {
        "phi": arguments.phi,
        "scorer": name or LABEL,
        "note": None if scorer else NOTE,
        "trials": [_trial_json(trial) for trial in trials],
    }
    if arguments.plot:
        plot.grid(arguments.plot, report)
    common.print_report(arguments, report, partial(_print_report, top=arguments.top))


def _scorer_of(arguments: argparse.Namespace) -> tuple[Scorer | None, str | None]:
    """The scorer and its name, None for the built-in estimate."""
    training = grid_training.scorer_of(arguments)
    if training is not None:
        return training, training.name
    if arguments.scorer is None:
        return None, None
    return _import_scorer(arguments.scorer), arguments.scorer


def _import_scorer(name: str) -> Scorer:
    module, _, function = name.partition(":")
    if not (module and function):
        raise common.CommandError(f"--scorer must be MODULE:FUNCTION, got {name!r}")
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        scorer: Scorer = getattr(importlib.import_module(module), function)
    except Exception as error:  # an import runs the module's code, which may raise anything
        raise common.CommandError(f"--scorer {name}: {type(error).__name__}: {error}") from error
    if not callable(scorer):
        raise common.CommandError(f"--scorer {name} is not a function")
    return scorer


def _trial_json(trial: Trial) -> dict[str, Any]:
    return {
        **vars(trial.scaling),
        "growth": trial.scaling.growth,
        "score": trial.score,
        "params": trial.parameters,
        "macs": trial.macs,
        "resolution": trial.resolution,
    }


def _print_report(report: dict[str, Any], top: int) -> None:
    table = [["", "alpha", "beta", "gamma", "product", "resolution", "params", "MAC", "score"]]
    for place, trial in enumerate(report["trials"][:top], 1):
        constants = [f"{trial[name]:g}" for name in ("alpha", "beta", "gamma")]
        table.append(
            [
                str(place),
                *constants,
                f"{trial['growth']:.3f}",
                str(trial["resolution"]),
                units.format_count(trial["params"]),
                units.format_count(trial["macs"]),
                f"{trial['score']:.3f}",
            ]
        )
    print(common.format_table(table))
    print(f"{len(report['trials'])} trials at phi {report['phi']:g}, scored by {report['scorer']}.")
    print(WORDS)
    if report["note"]:
        print(report["note"])
