"""`effnet-fast scale fit | grid | compare | table`: from a budget to a network."""

from __future__ import annotations

from typing import Any

from effnet_fast.cli.scale import compare, fit, grid, table

COMMANDS = (fit, grid, compare, table)


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand with its own subcommands."""
    parser = subparsers.add_parser(
        "scale",
        help="from a budget to a network: compound scaling",
        description="Compound scaling: networks between and beyond the published ones.",
    )
    own = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(own)
