"""The command line, one file or package per subcommand: `effnet-fast classify | bench | ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from effnet_fast import __version__
from effnet_fast.cli import bench, classify, convert, doctor, info, scale
from effnet_fast.cli.common import CommandError

COMMANDS = (classify, bench, convert, doctor, info, scale)
BAD_INPUT = 2  # exit status, argparse's own for wrong usage
INTERRUPTED = 130  # a shell's status for Ctrl-C


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each module adds its own and sets `run`."""
    parser = argparse.ArgumentParser(
        prog="effnet-fast", description="EfficientNet on fused kernels."
    )
    parser.add_argument("--version", action="version", version=f"effnet-fast {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Returns:
        the exit status: 0, 2 for wrong usage or bad input (one line on stderr), 130 for Ctrl-C.
    """
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except CommandError as error:
        print(f"effnet-fast: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
