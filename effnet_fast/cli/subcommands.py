"""The list of subcommands: a new one is a file or package here and a line in it."""

from __future__ import annotations

from effnet_fast import __version__
from effnet_fast.cli import (
    bench,
    classify,
    convert,
    doctor,
    evaluate,
    export,
    info,
    plot,
    predict,
    scale,
    train,
)
from effnet_fast.cli.common import Parser

SUBCOMMANDS = (
    *(classify, train, evaluate, predict, plot, export),
    *(bench, convert, doctor, info, scale),
)


def build_parser() -> Parser:
    """The parser of all subcommands; each module adds its own and sets `run`."""
    parser = Parser(prog="effnet-fast", description="EfficientNet on fused kernels.")
    parser.add_argument("--version", action="version", version=f"effnet-fast {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in SUBCOMMANDS:
        command.add_parser(subparsers)
    return parser
