"""`effnet-fast scale table`: the published networks beside the rule, and any phi."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from effnet_fast.cli import common
from effnet_fast.cli.scale import options, plot, units
from effnet_fast.cli.scale.options import WORDS
from effnet_fast.models.variants import Variant
from effnet_fast.scaling import CompoundScaling, Conditions, count, count_memory, published, traffic
from effnet_fast.scaling.compound import Point
from effnet_fast.scaling.conditions import DTYPES
from effnet_fast.scaling.memory_plans import PLANS as MEMORY_PLANS
from effnet_fast.scaling.passes import PLANS as TRAFFIC_PLANS

Row = tuple[str, Point, Variant | None]  # name, the rule's network, the published one


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "table",
        help="counts of the published networks and of the rule's",
        description="Counts of the published networks, and of the rule's network nearest to each. "
        "Nothing is run. " + WORDS,
    )
    parser.add_argument(
        "--phi", type=float, nargs="+", help="show the rule's networks at these phi instead"
    )
    options.add_rule(parser)
    parser.add_argument("--batch", type=common.positive_int, default=1, help="images per call")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    plot.add_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Prints two tables, or everything as JSON."""
    plot.check(arguments)
    rule = options.rule_of(arguments)
    with common.bad_input(ValueError, OverflowError):
        if arguments.phi:
            points = [rule.at(phi, multiple=arguments.multiple) for phi in arguments.phi]
            networks: list[Row] = [(f"phi {p.phi:g}", p, None) for p in points]
        else:
            beside = published(rule)
            networks = [(name, point, variant) for name, (variant, point) in beside.items()]
    conditions = Conditions(arguments.batch, DTYPES[arguments.dtype], plan="stock")
    report = {
        "rule": vars(rule),
        "batch": arguments.batch,
        "dtype": arguments.dtype,
        "networks": [
            network_report(name, point, variant, conditions) for name, point, variant in networks
        ],
    }
    if arguments.plot:
        plot.table(arguments.plot, report)
    common.print_report(arguments, report, partial(_print_report, rule=rule))


def network_report(
    name: str, point: Point, published: Variant | None, conditions: Conditions
) -> dict[str, Any]:
    """All counts of the published network, "rule" being the point's; without one, the point's."""
    variant = published or point.variant
    exact = None if published else point.exact_resolution
    size = conditions.dtype.itemsize

    def memory_of(mode: str, plan: str) -> dict[str, int]:
        return vars(
            count_memory(variant, mode, plan, batch=conditions.batch, dtype=conditions.dtype)
        )

    def traffic_of(mode: str, plan: str) -> int:
        rows = traffic(
            variant, mode, plan, batch=conditions.batch, element_size=size, weight_size=size
        )
        return sum(row.bytes for row in rows)

    report = {
        "name": name,
        "phi": point.phi,
        **options.network_json(variant, count(variant), exact),
        "memory_bytes": _nested(MEMORY_PLANS, memory_of),
        "traffic_bytes": _nested(TRAFFIC_PLANS, traffic_of),
    }
    if published:
        counts = count(point.variant)
        report["rule"] = options.network_json(point.variant, counts, point.exact_resolution)
    return report


def _nested(plans: Any, value: Any) -> dict[str, dict[str, Any]]:
    """{mode: {plan: value(mode, plan)}}."""
    nested: dict[str, dict[str, Any]] = {}
    for mode, plan in plans:
        nested.setdefault(mode, {})[plan] = value(mode, plan)
    return nested


def _print_report(report: dict[str, Any], rule: CompoundScaling) -> None:
    networks = report["networks"]
    print(f"alpha {rule.alpha:g}, beta {rule.beta:g}, gamma {rule.gamma:g}")
    head = ["", "phi", "depth", "width", "resolution", "params", "MAC", "FLOPs", "activations"]
    head.append("rounding")
    print(common.format_table([head, *(row for n in networks for row in _size_rows(n))]))
    print(
        "Rounding: what MAC gain because repeats are rounded up, and channels and the rule's "
        "resolutions\nto multiples."
    )
    print(f"\nBytes, batch {report['batch']}, {report['dtype']}")
    plans = [("memory_bytes", *key) for key in MEMORY_PLANS]
    plans += [("traffic_bytes", *key) for key in TRAFFIC_PLANS]
    for kind, title in (("memory_bytes", "peak memory"), ("traffic_bytes", "ideal traffic")):
        shown = [(mode, plan) for k, mode, plan in plans if k == kind]
        table = [[title, *(f"{mode} {plan}" for mode, plan in shown)]]
        for n in networks:
            values = [n[kind][mode][plan] for mode, plan in shown]
            amounts = [v["peak"] if isinstance(v, dict) else v for v in values]
            table.append([n["name"], *map(units.format_bytes, amounts)])
        print(common.format_table(table))
    print(
        "\nTraining counts parameters, gradients, Adam's state and what is saved for backward; "
        "fused is what\nthis version's CPU kernels do, fast and lean are the design. " + WORDS
    )


def _size_rows(network: dict[str, Any]) -> list[list[str]]:
    rows = [_size_row(network["name"], f"{network['phi']:.3f}", network)]
    if rule := network.get("rule"):
        rows.append(_size_row("  rule", "", rule))
        pairs = ("depth", "width", "resolution", "params", "macs", "flops", "activations")
        differences = [f"{rule[key] / network[key] - 1:+.1%}" for key in pairs]
        rows.append(["  difference", "", *differences, ""])
    return rows


def _size_row(name: str, phi: str, network: dict[str, Any]) -> list[str]:
    multipliers = [f"{network[key]:.3f}" for key in ("depth", "width")]
    counts = [network[key] for key in ("macs", "flops", "activations")]
    return [
        name,
        phi,
        *multipliers,
        str(network["resolution"]),
        f"{network['params']:,}",
        *map(units.format_count, counts),
        f"{network['macs'] / network['unrounded_macs'] - 1:+.1%}",
    ]
