"""`effnet-fast doctor`: what can run on this machine, and why the rest cannot."""

from __future__ import annotations

import argparse
from typing import Any

from effnet_fast import diagnostics
from effnet_fast.cli import common
from effnet_fast.models.variants import VARIANTS


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "doctor",
        help="what can run here, and why the rest cannot",
        description="Lists what can run here; with --model, which of its blocks are fused.",
    )
    common.add_common(parser, default_model=None)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Prints the report."""
    common.set_threads(arguments)
    model = None
    if arguments.model is not None:
        model = common.build_model(VARIANTS[arguments.model], "auto")
    report = diagnostics.doctor(model)
    if arguments.json:
        common.print_json(report.to_dict())
    else:
        print(report)
