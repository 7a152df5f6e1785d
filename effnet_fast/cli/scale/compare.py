"""`effnet-fast scale compare`: one dimension alone against all three, at equal work."""

from __future__ import annotations

import argparse
from typing import Any

from effnet_fast.cli import common
from effnet_fast.cli.scale import options, plot, units
from effnet_fast.cli.scale.options import WORDS
from effnet_fast.scaling import compare
from effnet_fast.scaling.accuracy import NOTE
from effnet_fast.scaling.conditions import to_json
from effnet_fast.scaling.latency import bursts
from effnet_fast.scaling.series import FACTORS, SERIES, Row


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "compare",
        help="depth, width or resolution alone against all three",
        description="Scales B0 in one dimension and in all, to equal multiply-adds, and times "
        "the networks. " + WORDS,
    )
    parser.add_argument(
        "--macs",
        type=units.parse_count,
        nargs="+",
        metavar="AMOUNT",
        help="multiply-adds of one image to scale to (default: 1, 2, 4 and 8 times B0's)",
    )
    parser.add_argument("--no-measure", action="store_true", help="print counts, run nothing")
    options.add_rule(parser)
    options.add_conditions(parser)
    plot.add_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_progress(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Prints a table of the series, or everything as JSON."""
    plot.check(arguments)
    conditions = options.conditions_of(arguments)
    rule = options.rule_of(arguments)
    networks = len(SERIES) * len(arguments.macs or FACTORS)
    with (
        common.bad_input(ValueError),
        common.progress(arguments, bursts(conditions, networks), "measuring") as bar,
    ):
        rows = compare(
            arguments.macs,
            scaling=rule,
            conditions=conditions,
            multiple=arguments.multiple,
            measured=not arguments.no_measure,
            on_burst=lambda name: bar.update(),
        )
    report = {
        "rule": vars(rule),
        "conditions": to_json(conditions),
        "note": NOTE,
        "networks": [_row_json(row) for row in rows],
    }
    if arguments.plot:
        plot.series(arguments.plot, report)
    common.print_report(arguments, report, _print_report)


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "series": row.series,
        "target_macs": row.target_macs,
        "phi": row.point.phi,
        **options.network_json(row.point.variant, row.counts, row.point.exact_resolution),
        "memory_peak": row.memory.peak,
        "top1_estimate": row.top1,
        "latency_s": row.seconds,
    }


def _print_report(report: dict[str, Any]) -> None:
    networks = report["networks"]
    plans = list(networks[0]["latency_s"] or ())
    head = ["", "MAC", "depth", "width", "resolution", "params", "activations", "memory"]
    table = [[*head, *plans, "top-1, estimate"]]
    for n in networks:
        counts = [n["macs"], n["params"], n["activations"]]
        macs, params, activations = map(units.format_count, counts)
        table.append(
            [
                n["series"],
                macs,
                f"{n['depth']:.2f}",
                f"{n['width']:.2f}",
                str(n["resolution"]),
                params,
                activations,
                units.format_bytes(n["memory_peak"]),
                *(units.format_seconds(n["latency_s"][plan]) for plan in plans),
                "-" if n["top1_estimate"] is None else f"{n['top1_estimate']:.1f}%",
            ]
        )
    print(common.format_table(table))
    c = report["conditions"]
    print(
        f"{'A training step' if c['training'] else 'Inference'}, batch {c['batch']}, {c['dtype']}, "
        f"{c['device']}; memory of {c['plan']} blocks. {WORDS}\n{report['note']}"
    )
